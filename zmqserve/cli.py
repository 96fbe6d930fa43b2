"""The command `zmqserve`: start a network, ask it, look at it."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

from . import bridge_command, keys_command, logs, plugins, up
from .arguments import curve_options, filled, key_options, positive, seconds
from .config import CLIENT_ENDPOINT, WORKER_ENDPOINT, load_config
from .controller import Controller
from .dispatch import POLICIES
from .errors import ConnectionFailed, InvalidParameter, MemoryExceeded, RequestError, ZmqserveError
from .heap import freeze_heap
from .params import SamplingParams, build
from .terminal import figures, printing, say, table
from .worker import BaseModelWorker, WorkerConfig

if TYPE_CHECKING:
    from .client import Client

USAGE, FAILED, UNREACHABLE, MEMORY, INTERRUPTED = 2, 1, 3, 4, 130
EXIT_CODES = """exit codes:
  0 it worked   1 the request failed   2 wrong arguments   3 no controller answered
  4 the controller ended: its process held more than memory_bytes   130 interrupted

environment:
  ZMQSERVE_CONTROLLER       the controller's client endpoint(s), separated by commas, where --controller is not given
  ZMQSERVE_KEY              for clients and workers: as --key, where neither that nor --controller-key is given
  ZMQSERVE_CONTROLLER_KEY   likewise: as --controller-key; several are separated by commas"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parser(arguments).parse_args(arguments)
        run: Callable[[argparse.Namespace], int] = args.run
        return run(args)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # Who read our output has left (head, less): nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ZmqserveError as error:
        return _told(error)


def _told(error: ZmqserveError) -> int:
    """Say what went wrong, after what was logged before; returns the exit code."""
    logs.finish()
    say(f"zmqserve: {error}", file=sys.stderr)
    if isinstance(error, ConnectionFailed):
        return UNREACHABLE
    if isinstance(error, MemoryExceeded):
        return MEMORY
    return USAGE if isinstance(error, InvalidParameter) else FAILED


# --- serving -----------------------------------------------------------------------------------


def controller(args: argparse.Namespace) -> int:
    """Run a controller until SIGINT or SIGTERM."""
    logs.configure(args.log_level, args.log_json)
    config = load_config(
        args.config,
        clients=args.clients,
        workers=args.workers,
        parents=args.parent,
        name=args.name,
        dispatch=args.dispatch,
        curve_dir=args.curve_dir,
        insecure=args.insecure,
        parent_key=args.parent_key,
        parent_controller_key=args.parent_controller_key,
    )
    broker = Controller(config)
    broker.bind()

    def stop(_number: int, _frame: FrameType | None) -> None:
        broker.stop()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    if config.curve_dir is not None:
        signal.signal(signal.SIGHUP, lambda _number, _frame: broker.reload())
    freeze_heap()
    broker.run()
    return 0


def worker(args: argparse.Namespace) -> int:
    """Run a worker until it is drained: by SIGINT, SIGTERM or `zmqserve drain`."""
    if args.exit_with_parent is not None:
        up.exit_with_parent(args.exit_with_parent)
    logs.configure(args.log_level, args.log_json)
    backend: type[BaseModelWorker] = args.backend
    config = WorkerConfig(
        model=args.model,
        served_name=args.name,
        name=args.worker_name,
        controllers=tuple(args.controller or [WORKER_ENDPOINT]),
        slots=args.slots,
        speed=args.speed,
        ttl_s=args.ttl,
        grace_s=args.grace,
        key=args.key,
        controller_key=args.controller_key,
    )
    made = backend.from_arguments(config, args)
    try:
        made.run()
    except BaseException as error:
        if made.left_running:
            _leave(error)
        raise
    if made.left_running:
        _leave(None)
    return 0


def _leave(error: BaseException | None) -> NoReturn:
    """End the process at once: Python's own exit would wait for the threads of an engine that hangs, or of a load that goes on."""
    logs.finish()
    code = 0 if error is None else FAILED
    try:
        if isinstance(error, ZmqserveError):
            code = _told(error)
        elif error is not None:
            sys.excepthook(type(error), error, error.__traceback__)
        sys.stderr.flush()
    finally:
        os._exit(code)


# --- asking ------------------------------------------------------------------------------------


def ask(args: argparse.Namespace) -> int:
    """Stream an answer to the terminal."""
    prompt = _standard_input() if args.prompt == "-" else args.prompt
    given = {"max_tokens": args.max_tokens, "seed": args.seed, "temperature": args.temperature, "stop": args.stop}
    params = build(SamplingParams, None, {name: value for name, value in given.items() if value is not None})
    with _client(args) as client:
        asked = prompt if args.raw or not _can_chat(client, args.model) else [{"role": "user", "content": prompt}]
        begun = False
        try:
            with client.generate(args.model, asked, params=params) as stream:
                for chunk in stream:
                    say(chunk.text, end="", flush=True)
                    begun = True
        except (ZmqserveError, KeyboardInterrupt):
            if begun:  # what is said about it begins a line
                print(flush=True)
            raise
        print()
        if args.stats:
            say(figures(stream.completion), file=sys.stderr)
    return 0


def _standard_input() -> str:
    """The prompt that is there; InvalidParameter where there is none."""
    try:
        if sys.stdin is None:
            raise OSError("it is closed")
        return sys.stdin.read()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidParameter(f"no prompt can be read from standard input: {error}", data={"parameter": "prompt"}) from None


def _can_chat(client: Client, name: str) -> bool:
    for model in client.models():
        if name == model.name or name in model.aliases:
            return "chat" in model.card.verbs
    return False


def embed(args: argparse.Namespace) -> int:
    """Print one JSON array of numbers per text."""
    with _client(args) as client:
        for vector in client.embed(args.model, args.texts):
            print("[" + ", ".join(f"{number:.8g}" for number in vector) + "]")
    return 0


def models(args: argparse.Namespace) -> int:
    """List what is served."""
    with _client(args) as client:
        rows = [
            (
                model.name,
                model.state,
                str(len(model.workers)),
                f"{model.running}/{model.slots}",
                str(model.waiting),
                str(model.context_length or "-"),
                ",".join(model.card.verbs),
            )
            for model in client.models()
        ]
    table(("MODEL", "STATE", "WORKERS", "RUNNING", "WAITING", "CONTEXT", "VERBS"), rows)
    return 0


def status(args: argparse.Namespace) -> int:
    """Show the controller's state."""
    import msgspec

    with _client(args) as client:
        state = client.status()
    if args.json:
        say(msgspec.json.format(msgspec.json.encode(state), indent=2).decode())
        return 0
    say(f"controller {state.controller}, up {state.up_s:.0f} s, {state.dispatch}, version {state.version}")
    say(f"clients on {', '.join(state.client_endpoints)}; workers on {', '.join(state.worker_endpoints)}")
    print(f"{state.running} running, {state.waiting} waiting, {state.clients} clients with open requests\n")
    rows = [
        (
            each.name,
            each.backend,
            each.state,
            ",".join(each.models),
            f"{each.running}/{each.slots}",
            f"{each.speed:g}",
            str(each.finished),
            f"{each.heard_ms:.0f}",
        )
        for each in state.workers
    ]
    table(("WORKER", "BACKEND", "STATE", "MODELS", "RUNNING", "SPEED", "FINISHED", "HEARD MS AGO"), rows)
    return 0


def drain(args: argparse.Namespace) -> int:
    """Let a worker finish what it runs and leave."""
    with _client(args) as client:
        running = client.drain_worker(args.worker, args.grace)
    print(f"{args.worker} is draining; {running} requests are still on it")
    return 0


def _client(args: argparse.Namespace) -> Client:
    from .client import Client

    keys = {"key": args.key, "controller_key": args.controller_key}
    return Client(args.controller, timeout_s=args.timeout, connect_timeout_s=args.connect_timeout, **keys)


# --- arguments ---------------------------------------------------------------------------------


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zmqserve",
        description="Language models over ZeroMQ: a controller, workers and clients.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('zmqserve')}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    backends = ", ".join(plugins.names())

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        made.set_defaults(run=run)
        return made

    serve = command("controller", controller, "run the controller, which clients and workers connect to")
    serve.add_argument(
        "--clients", action="append", metavar="ENDPOINT", help=f"bind for clients; may be repeated (default {CLIENT_ENDPOINT})"
    )
    serve.add_argument(
        "--workers", action="append", metavar="ENDPOINT", help=f"bind for workers; may be repeated (default {WORKER_ENDPOINT})"
    )
    serve.add_argument("--dispatch", choices=sorted(POLICIES), help="how a worker is chosen (default shortest_queue)")
    serve.add_argument(
        "--parent",
        action="append",
        metavar="ENDPOINT",
        help="the worker side of a controller above, to be a worker of; may be repeated (default none)",
    )
    serve.add_argument("--parent-key", metavar="FILE", help="the pair of keys by which parents know this controller, for CURVE")
    serve.add_argument(
        "--parent-controller-key",
        action="append",
        metavar="FILE",
        help="the key of a parent's port for workers; one, or one for each",
    )
    serve.add_argument("--name", help="what parents know this controller by (default: controller, host and a random suffix)")
    curve_options(serve)
    serve.add_argument("--config", type=Path, metavar="FILE", help="TOML with any of ControllerConfig's settings; options win over it")
    _log_options(serve)

    work = command("worker", worker, f"run a worker: one model on one backend ({backends})")
    _backend_options(work, arguments, backends)
    work.add_argument(
        "--controller", action="append", metavar="ENDPOINT", help=f"a controller's worker side; may be repeated (default {WORKER_ENDPOINT})"
    )
    work.add_argument(
        "--worker-name", metavar="NAME", help="the worker's own name in status and logs (default: backend, host and a random suffix)"
    )
    work.add_argument(
        "--ttl",
        type=seconds,
        default=WorkerConfig.ttl_s,
        metavar="S",
        help="seconds of silence after which controllers give it up: more than its largest message takes on its link (default 3)",
    )
    key_options(work, "workers")
    work.add_argument("--exit-with-parent", type=positive, metavar="PID", help=argparse.SUPPRESS)
    _log_options(work)

    both = command("up", up.run, "run a controller and its workers together; Ctrl-C drains them")
    _backend_options(both, arguments, backends)
    both.add_argument("--replicas", type=positive, metavar="N", help="workers to start (default: one per GPU given, else 1)")
    both.add_argument("--gpus", metavar="LIST", help="GPU numbers like 0,1: each worker sees one of them")
    both.add_argument("--clients", action="append", metavar="ENDPOINT", help=f"bind for clients (default {CLIENT_ENDPOINT})")
    both.add_argument("--workers", action="append", metavar="ENDPOINT", help=f"bind for workers (default {WORKER_ENDPOINT})")
    both.add_argument("--dispatch", choices=sorted(POLICIES), help="how a worker is chosen (default shortest_queue)")
    both.add_argument("--key", metavar="FILE", help="with --curve-dir: the workers' pair of keys, which DIR/workers must allow")
    curve_options(both)
    _log_options(both)
    both.set_defaults(arguments=list(arguments))

    pipe = command("bridge", bridge_command.run, "answer the jobs of a ZeroMQ pipeline: from a PULL socket, to a PUSH socket")
    bridge_command.options(pipe)
    _log_options(pipe)

    query = command("ask", printing(ask), "ask a model and stream its answer to the terminal")
    query.add_argument("model", help="a name that `zmqserve models` lists")
    query.add_argument("prompt", help="the question, in quotes; - reads it from standard input")
    query.add_argument("--max-tokens", type=int, metavar="N", help="stop after N tokens")
    query.add_argument("--temperature", type=float, metavar="T", help="0 is greedy (default 1)")
    query.add_argument("--seed", type=int, metavar="N", help="for a repeatable answer")
    query.add_argument("--stop", action="append", metavar="TEXT", help="end the answer before this text; may be repeated")
    query.add_argument("--raw", action="store_true", help="send the prompt as it is, without the model's chat template")
    query.add_argument("--stats", action="store_true", help="print a line of figures to standard error at the end")
    _client_options(query)

    vectors = command("embed", printing(embed), "print the embedding of each text, a JSON array a line")
    vectors.add_argument("model", help="a name that `zmqserve models` lists")
    vectors.add_argument("texts", nargs="+", metavar="TEXT")
    _client_options(vectors)

    _client_options(command("models", printing(models), "list the models that are served"))
    state = command("status", printing(status), "show the controller's workers, models and queues")
    state.add_argument("--json", action="store_true", help="everything, as JSON")
    _client_options(state)
    keys = commands.add_parser("keys", help="make keys for CURVE, and say whose a controller allows", allow_abbrev=False)
    keys_command.options(keys)
    leave = command("drain", printing(drain), "let a worker finish what it runs, give it nothing new, and let it go")
    leave.add_argument("worker", help="a name that `zmqserve status` lists")
    leave.add_argument("--grace", type=float, metavar="S", help="seconds until the rest of its requests move (default: the controller's)")
    _client_options(leave)
    return parser


def _backend_options(parser: argparse.ArgumentParser, arguments: Sequence[str], backends: str) -> None:
    parser.add_argument(
        "backend", metavar="BACKEND", type=_backend, help=f"one of: {backends}; its own options: zmqserve COMMAND BACKEND --help"
    )
    chosen = None
    if len(arguments) > 1 and arguments[0] in ("worker", "up") and arguments[1] in plugins.names() and parser.prog.endswith(arguments[0]):
        chosen = plugins.load(arguments[1])
    needs_model = chosen is None or chosen.needs_model
    parser.add_argument(
        "--model",
        required=needs_model,
        type=filled if needs_model else str,
        default="",
        metavar="PATH_OR_ID",
        help="what to load: a local path, a Hugging Face id, smollm2-135m or all-minilm-l6-v2",
    )
    parser.add_argument("--name", metavar="MODEL_NAME", help="the name that clients ask for (default: from --model)")
    parser.add_argument("--slots", type=positive, metavar="N", help="requests at a time (default: the backend's)")
    parser.add_argument("--speed", type=float, default=1.0, metavar="X", help="relative speed, for dispatch (default 1)")
    parser.add_argument(
        "--grace", type=seconds, default=30.0, metavar="S", help="seconds to finish running requests when told to stop (default 30)"
    )
    if chosen is not None:
        chosen.add_arguments(parser.add_argument_group(f"{arguments[1]} options"))


def _client_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--controller",
        action="append",
        metavar="ENDPOINT",
        help=f"the controller's client side; may be repeated (default {CLIENT_ENDPOINT})",
    )
    key_options(parser, "clients")
    parser.add_argument(
        "--connect-timeout", type=float, default=0.5, metavar="S", help="what each controller may take to answer (default 0.5)"
    )
    parser.add_argument("--timeout", type=float, metavar="S", help="give up after so many seconds")


def _log_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--log-level", choices=logs.LEVELS, default="info", help="least important lines to log (default info)")
    parser.add_argument("--log-json", action="store_true", default=None, help="log JSON also on a terminal")


def _backend(name: str) -> type[BaseModelWorker]:
    try:
        return plugins.load(name)
    except RequestError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
