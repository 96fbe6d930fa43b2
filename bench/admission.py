"""A crowd's way into a vLLM engine: the worker's front end beside AsyncLLM.generate, on the same engine.

    python -m bench admission [--requests 256] [--input-len 128] [--runs 7] [--model PATH]

So many requests come at once, by turns in two ways: encoded and in the batches of a worker's socket thread, into a VLLMWorker's desk; and
with the same ids as tasks over AsyncLLM.generate. Neither has sockets to its clients. The engine's first step takes what has come by then
and who comes later waits for its end, so a front end has to be quick. Times are from the crowd's coming: to the first and the last request
handed to the engine's process, and until each has its first token; `passes` are those over the engine's outputs till then (a large step's
are several). CPU is that of this process until the last is handed over, for each request. The engine counts no statistics of tokens, as the
worker has it, which spares generate some work. Without --model it is a Llama of one layer with random weights, so that nearly all is the
front end. `ratios` in the last line, lower is better: the worker's figure over generate's, median of the runs.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from zmqserve import WorkerConfig
from zmqserve import messages as m
from zmqserve.admission import by_name
from zmqserve.answers import Answer
from zmqserve.engine import Engine
from zmqserve.lane import Lane
from zmqserve.linkthread import BATCH
from zmqserve.params import SamplingParams

from .result import Spread, add_out, print_last_line, progress, rounded, table

IDS = range(2, 256)
"""Ids of the prompts: any model has these."""
TOKENS = 4
PATIENCE_S = 300.0
FIGURES = ("first_handed_over_ms", "last_handed_over_ms", "cpu_us_per_request", "passes", "all_have_a_token_ms")
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


def add_arguments(names: Any) -> None:
    """The subcommand's options."""
    parser = names.add_parser("admission", help="many requests at once: a vLLM worker's front end beside AsyncLLM.generate")
    parser.add_argument("--requests", type=int, default=256, metavar="N", help="at once (default 256)")
    parser.add_argument("--input-len", type=int, default=128, metavar="N", help="ids of a prompt, up to 2000 without --model (default 128)")
    parser.add_argument("--runs", type=int, default=7, metavar="N", help="of each way (default 7)")
    parser.add_argument("--model", metavar="PATH", help="what vLLM is to load (default: one layer, made here)")
    add_out(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The benchmark."""
    if find_spec("vllm") is None:
        print("admission: skipped, vLLM is not installed here (`make test-vllm` sets .venv-vllm up, where it is)")
        return 0
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from zmqserve.backends import vllm_engine
    from zmqserve.backends.vllm_worker import VLLMWorker

    longest = args.input_len + TOKENS
    engine_args = {"max_num_seqs": str(args.requests), "max_model_len": str(longest), "max_num_batched_tokens": str(max(8192, longest))}
    engine_args |= {"enforce_eager": "true", "enable_prefix_caching": "false"} | ({} if args.model else {"load_format": "dummy"})
    figures: dict[str, list[tuple[float, ...]]] = {"generate": [], "worker": []}
    with tempfile.TemporaryDirectory(prefix="zmqserve-bench-") as folder:
        if args.model is None:
            subprocess.run([sys.executable, "-I", Path(__file__).with_name("peers") / "vllm_model.py", folder], check=True)
        worker = VLLMWorker(WorkerConfig(model=args.model or folder, served_name="m"), engine_args=engine_args)
        watch = Watch()
        # As a worker starts, but for its sockets.
        worker._engine = engine = Engine(worker, watch, on_crash=lambda _: None, on_end=lambda: None)
        engine.start()
        try:
            engine.desk.cards = by_name(worker.load())
            watch.look_at(worker._parts().engine)  # an AsyncLLM
            for turn in progress(args.runs + 1, "admission"):  # the first is a warm-up
                draw = random.Random(turn)
                prompts = [draw.choices(IDS, k=args.input_len) for _ in range(args.requests)]
                for name, way in (("generate", _generate), ("worker", _worker)):
                    made = asyncio.wait_for(way(engine, watch, prompts), PATIENCE_S)
                    asyncio.run_coroutine_threadsafe(made, engine._loop).result()
                    figures[name] += [watch.figures()] if turn else []
        finally:
            engine.halt()
            engine.join()
            worker.close()
    pairs = zip(*figures.values(), strict=True)
    figures["worker/generate"] = [tuple(ours / theirs for theirs, ours in zip(*pair, strict=True)) for pair in pairs]
    spreads = {name: dict(zip(FIGURES, map(Spread.of, zip(*each, strict=True)), strict=True)) for name, each in figures.items()}
    header = ("", *(text for name in spreads for text in (name, "min..max")))
    print(table(header, [(name, *(cell for each in spreads.values() for cell in each[name].cells(2))) for name in FIGURES]))
    ratios = {name: spread.median for name, spread in spreads.pop("worker/generate").items()}
    kept = {way: {name: rounded(spread._asdict(), 3) for name, spread in each.items()} for way, each in spreads.items()}
    settings = {"requests": args.requests, "input_len": args.input_len, "output_len": TOKENS, "runs": args.runs, "engine_args": engine_args}
    settings |= {"model": Path(args.model).name if args.model else "one layer", "vllm": vllm_engine.library()}
    print_last_line("admission", settings, args.out, figures=kept, ratios=rounded(ratios))
    return 0


class Watch:
    """Sees what goes to the engine's process and what comes from it, since `begin`. To the worker it is the Outbound to a controller."""

    all_ended: asyncio.Future[None]

    def look_at(self, engine: Any) -> None:
        """At what comes and goes there from now on."""
        self.async_llm = engine
        core, outputs = engine.engine_core, engine.output_processor
        self._add, core.add_request_async = core.add_request_async, self._added
        self._process, outputs.process_outputs = outputs.process_outputs, self._processed

    def begin(self, requests: int) -> None:
        """So many come now."""
        self._requests = self._left = requests
        self._handed_ms: list[float] = []
        self._begun: set[int] = set()
        self._passes = 0
        self._cpu_s = self._all_begun_ms = 0.0
        self._began_s, self._began_cpu_s = time.perf_counter(), time.process_time()

    def begun(self, number: int) -> None:
        """This request has tokens."""
        self._begun.add(number)
        if len(self._begun) == self._requests and not self._all_begun_ms:
            self._all_begun_ms = self._now_ms()

    def figures(self) -> tuple[float, ...]:
        """As FIGURES names them."""
        assert len(self._handed_ms) == len(self._begun) == self._requests
        return self._handed_ms[0], self._handed_ms[-1], 1e6 * self._cpu_s / self._requests, self._passes, self._all_begun_ms

    async def _added(self, request: Any) -> None:
        await self._add(request)
        self._handed_ms.append(self._now_ms())
        if len(self._handed_ms) == self._requests:
            self._cpu_s = time.process_time() - self._began_cpu_s

    def _processed(self, *arguments: Any, **named: Any) -> Any:
        self._passes += len(self._begun) < self._requests
        return self._process(*arguments, **named)

    def _now_ms(self) -> float:
        return 1000 * (time.perf_counter() - self._began_s)

    def behind(self, lane: Lane) -> bool:  # noqa: ARG002 - everything leaves at once
        return False

    def pauses(self, lane: Lane) -> bool:  # noqa: ARG002 - the same
        return False

    def post(self, lane: Lane, head: bytes, payload: bytes, ended: Answer | None = None) -> None:  # noqa: ARG002 - as Outbound has it
        told = m.decoder(m.WorkerHead).decode(head)
        if told.kind == m.FAILED and not self.all_ended.done():
            self.all_ended.set_exception(RuntimeError(f"a request failed: {payload!r}"))
        elif told.kind != m.MORE:
            self.begun(told.rid)
        self._left -= ended is not None
        if not self._left and not self.all_ended.done():
            self.all_ended.set_result(None)

    def wake(self) -> None:
        pass


async def _worker(engine: Engine, watch: Watch, prompts: list[list[int]]) -> None:
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True, temperature=0)
    controller: Any = None
    lane = Lane(controller, 1, watch, WorkerConfig().limits.message_bytes)
    calls: list[tuple[Any, ...]] = []
    for number, ids in enumerate(prompts, 1):
        head = m.ControllerHead(m.REQUEST, lane.epoch, 1, number, int(1000 * PATIENCE_S))
        payload = m.encode(m.Generate(number, "m", token_ids=m.pack_ids(ids), params=params))
        calls.append((engine.desk.request, lane, head, payload, True, "", time.monotonic()))
    watch.all_ended = asyncio.get_running_loop().create_future()
    watch.begin(len(calls))
    for start in range(0, len(calls), BATCH):
        engine.call(calls[start : start + BATCH])
        await asyncio.sleep(0)
    await watch.all_ended


async def _generate(_: Engine, watch: Watch, prompts: list[list[int]]) -> None:
    import vllm
    from vllm.sampling_params import RequestOutputKind

    async def one(number: int, ids: list[int]) -> None:
        params = vllm.SamplingParams(max_tokens=TOKENS, ignore_eos=True, temperature=0, output_kind=RequestOutputKind.DELTA)
        async for _ in watch.async_llm.generate({"prompt_token_ids": ids}, params, f"generate {number}"):
            watch.begun(number)

    watch.begin(len(prompts))
    await asyncio.gather(*[one(number, ids) for number, ids in enumerate(prompts, 1)])
