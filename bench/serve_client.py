"""One client process of `bench serve`: sends its share of the requests, and records what becomes of each."""

from __future__ import annotations

import asyncio
import gc
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from msgspec import Struct

from zmqserve import AsyncClient
from zmqserve.errors import ZmqserveError
from zmqserve.results import Completion

from .metrics import Record
from .serve_lag import TICK_S, Lag
from .serve_samples import Kind, Sample

CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Ask:
    """How every request is asked. `sampling`: parameters beside max_tokens; `timeout_s`: the deadline of each."""

    endpoints: Sequence[str]
    model: str
    kind: Kind
    sampling: Mapping[str, Any]
    timeout_s: float | None


@dataclass(frozen=True)
class Share:
    """What one process has to do. `due_s`: when each of `samples` is to be sent, from the start; `indices`: their numbers in the run.

    concurrency: at most so many open at once; None: no bound. warmups: requests for `warmup` before the start, which are not recorded.
    """

    ask: Ask
    samples: Sequence[Sample]
    indices: Sequence[int]
    due_s: Sequence[float]
    concurrency: int | None
    warmup: Sample
    warmups: int


class Part(Struct):
    """What one process brings back. `ended_s`: when its last request had ended, of time.perf_counter."""

    records: list[Record]
    lag: Lag
    ended_s: float


def main(pipe: Connection, share: Share, ended: Any) -> None:
    """The process: says None when it is warm, gets the time to start at, then a time every TICK_S, and sends its Part.

    `ended`: a shared number, of requests that have ended so far.
    """
    # Ctrl-C goes to the whole group of processes; the parent ends this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    asyncio.run(_run(pipe, share, ended))


async def _run(pipe: Connection, share: Share, ended: Any) -> None:
    loop = asyncio.get_running_loop()
    ask = share.ask
    lag = Lag()
    begin: asyncio.Future[float] = loop.create_future()

    def read() -> None:
        while pipe.poll():
            try:
                written_s: float = pipe.recv()
            except (EOFError, ConnectionError):
                raise SystemExit("the process that started this one has ended") from None
            if begin.done():
                lag.reads.append(time.perf_counter() - written_s)
            else:
                begin.set_result(written_s)

    async with AsyncClient(list(ask.endpoints), name="bench serve", timeout_s=ask.timeout_s, connect_timeout_s=CONNECT_TIMEOUT_S) as client:
        gate = asyncio.Semaphore(share.concurrency) if share.concurrency else nullcontext()
        warm = [Record(-1, share.warmup.input_tokens) for _ in range(share.warmups)]
        await asyncio.gather(*[_request(client, ask, share.warmup, record, gate) for record in warm])
        gc.collect()
        gc.freeze()
        loop.add_reader(pipe.fileno(), read)
        pipe.send(None)
        start_s = await begin
        ticking = asyncio.create_task(_tick(lag))
        used_s = time.process_time()
        records = [Record(index, sample.input_tokens) for index, sample in zip(share.indices, share.samples, strict=True)]
        tasks: list[asyncio.Task[None]] = []

        def count(_task: asyncio.Task[None]) -> None:
            ended.value += 1

        for record, sample, due_s in zip(records, share.samples, share.due_s, strict=True):
            record.due_s = start_s + due_s
            # Also where it is due already: what has come meanwhile is to be read, however late the client is.
            await asyncio.sleep(max(0.0, record.due_s - time.perf_counter()))
            record.arrival_s = time.perf_counter()
            lag.arrivals.append(record.arrival_s - record.due_s)
            tasks.append(asyncio.create_task(_request(client, ask, sample, record, gate)))
            tasks[-1].add_done_callback(count)
        await asyncio.gather(*tasks)
        ended_s = time.perf_counter()
        lag.cpu_share = (time.process_time() - used_s) / max(ended_s - start_s, 1e-9)
        ticking.cancel()
        loop.remove_reader(pipe.fileno())
    pipe.send(Part(records, lag, ended_s))


async def _request(client: AsyncClient, ask: Ask, sample: Sample, record: Record, gate: Any) -> None:
    """Whatever becomes of it stands in the record."""
    async with gate:
        last_s = record.start_s = time.perf_counter()
        itls_s: list[float] = []
        began = False
        try:
            stream = client.generate(ask.model, sample.as_prompt(ask.kind), max_tokens=sample.output_tokens, **ask.sampling)
            async for _chunk in stream:
                now_s = time.perf_counter()
                if began:
                    itls_s.append(now_s - last_s)
                else:
                    began = True
                    record.ttft_s = now_s - record.start_s
                last_s = now_s
            _finish(record, stream.completion, began=began, chunks=1 + len(itls_s))
        except ZmqserveError as error:
            record.error_type, record.error = type(error).__name__, str(error)
        except Exception as error:  # noqa: BLE001 - one request's trouble is a line of the result, and never the end of the run
            record.error_type, record.error = type(error).__name__, repr(error)
        record.itls_s = itls_s
        record.latency_s = last_s - record.start_s


def _finish(record: Record, completion: Completion, *, began: bool, chunks: int) -> None:
    usage, timings = completion.usage, completion.timings
    # A worker of a remote API may not be told the usage, nor ids.
    record.output_tokens = usage.completion_tokens or len(completion.token_ids) or chunks
    record.input_tokens = usage.prompt_tokens or record.input_tokens
    record.text, record.finish_reason, record.resumed = completion.text, completion.finish_reason, completion.resumed
    record.worker, record.queue_ms, record.first_ms, record.total_ms = timings.worker, timings.queue_ms, timings.first_ms, timings.total_ms
    if not began:
        record.error_type, record.error = "NoChunk", "the answer ended without a chunk: there is no time to first token"
    elif completion.finish_reason == "cancelled":
        record.error_type, record.error = "Cancelled", "the answer was cancelled on its way"


async def _tick(lag: Lag) -> None:
    while True:
        due_s = time.perf_counter() + TICK_S
        await asyncio.sleep(TICK_S)
        lag.timers.append(time.perf_counter() - due_s)
