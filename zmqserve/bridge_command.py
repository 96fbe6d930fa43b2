"""The command `zmqserve bridge`."""

from __future__ import annotations

import argparse
import signal
from types import FrameType

from . import logs
from .arguments import key_options, positive, seconds
from .bridge import Bridge
from .config import CLIENT_ENDPOINT
from .heap import freeze_heap

STOPS = (signal.SIGTERM, signal.SIGINT)


def run(args: argparse.Namespace) -> int:
    """Run a bridge until SIGINT or SIGTERM, which let it finish; a second one ends it at once, SIGUSR1 logs its counters."""
    logs.configure(args.log_level, args.log_json)
    bridge = Bridge(
        args.controller,
        pull=args.pull,
        push=args.push,
        model=args.model,
        bind_pull=args.bind_pull,
        bind_push=args.bind_push,
        concurrency=args.concurrency,
        window=args.window,
        ordered=args.ordered,
        drain_s=args.drain,
        job_bytes=args.job_bytes,
        insecure=args.insecure,
        timeout_s=args.timeout,
        key=args.key,
        controller_key=args.controller_key,
        name=args.name,
    )

    def stop(_number: int, _frame: FrameType | None) -> None:
        for number in STOPS:
            signal.signal(number, signal.SIG_DFL)
        bridge.stop()

    for number in STOPS:
        signal.signal(number, stop)
    signal.signal(signal.SIGUSR1, lambda _number, _frame: bridge.tell())
    freeze_heap()
    bridge.run()  # told to stop before it began, it ends at once
    return 0


def options(parser: argparse.ArgumentParser) -> None:
    """Its own options, less those for logs."""
    for name, what in (("pull", "jobs come from"), ("push", "results go to")):
        parser.add_argument(f"--{name}", action="append", required=True, metavar="ENDPOINT", help=f"where {what}; may be repeated")
    for name in ("pull", "push"):
        parser.add_argument(f"--bind-{name}", action="store_true", help=f"bind --{name} (default: connect)")
    parser.add_argument("--model", metavar="NAME", help="for jobs that name none")
    parser.add_argument(
        "--controller",
        action="append",
        metavar="ENDPOINT",
        help=f"a controller's client side; may be repeated (default {CLIENT_ENDPOINT})",
    )
    key_options(parser, "clients")
    parser.add_argument("--concurrency", type=positive, default=64, metavar="N", help="jobs asked at one time (default 64)")
    parser.add_argument(
        "--window",
        type=positive,
        metavar="N",
        help="jobs taken whose results have not left; beyond it none is taken (default: twice the concurrency)",
    )
    parser.add_argument("--ordered", action="store_true", help="results in the order of their jobs (default: as they end)")
    parser.add_argument("--timeout", type=seconds, metavar="S", help="what a job may take that says nothing itself (default: no bound)")
    parser.add_argument(
        "--drain", type=seconds, default=10.0, metavar="S", help="when told to stop: how long jobs that still arrive are taken (default 10)"
    )
    parser.add_argument("--job-bytes", type=positive, default=16 * 2**20, metavar="N", help="a larger job gets an error (default 16 MiB)")
    parser.add_argument("--insecure", action="store_true", help="bind --pull and --push where other machines may reach them, too")
    parser.add_argument("--name", default="", help="what the controller shows for it")
