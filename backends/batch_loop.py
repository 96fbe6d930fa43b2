"""One thread that makes tokens for all requests in one forward a step: transformers' continuous batching."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from inspect import signature
from itertools import count
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.continuous_api import BackgroundThreadStatus

from zmqserve.errors import BackendError
from zmqserve.logs import Logger

from .batch_cache import CacheSize
from .checkpoint import Checkpoint
from .engine_thread import BREAK_S, MOST_BREAKS
from .model_errors import out_of_memory, runs_no_more
from .row_sampling import Outlet, RowSampling
from .sequences import Token, TokenSequence, hand_over
from .turns import Turns

log = Logger("zmqserve.transformers")

GROW_STEPS = 16
"""After so many steps without a break one more may be in the batch than a break has left: what broke it may have gone."""


class BatchLoop(threading.Thread):
    """A SequenceEngine. At most `most` sequences are in the batch at once, the others wait. No request waits while another has several.

    An error in the forward breaks the library's loop and fails all that is in it. Here the loop goes on: what was in the batch
    is tried again from its ids so far, each alone for one token; one that breaks the loop when it is alone fails, if a single id that
    runs after it says that it was not the model, and the others come together again. If they break it although each runs alone
    (memory), half as many may run together from then on, and with time more again. So a break costs each a step, and no two breaks
    with the same ones leave the batch as large.
    Raises what the library raises for a model that it cannot batch. `on_death`: what to call, from its thread, when it can make no
    more; what is open is left to whoever ends the worker then.
    """

    def __init__(self, name: str, checkpoint: Checkpoint, size: CacheSize, most: int) -> None:
        super().__init__(name=name, daemon=True)
        # Its errors arrive here and are logged with what they mean; its own lines would have another form.
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
        self._lock = threading.RLock()
        self._numbers = count()
        self._most = most
        self._limit = most
        self._good_steps = 0
        self._waiting = Turns()
        self._running: dict[str, TokenSequence] = {}
        self._in_batch: list[str] = []
        self._trying = False
        self._to_try: deque[TokenSequence] = deque()
        self._tried: list[TokenSequence] = []
        # Broke it alone, and waits for what the probe says, whose request id is beside it.
        self._suspect: tuple[TokenSequence, Exception] | None = None
        self._probe = ""
        self._serving = False
        self._closing = threading.Event()
        self._breaks = 0
        self.on_death: Callable[[Exception], object] | None = None
        self._stepped_s = 0.0
        self._rows = RowSampling(self._running, self._began)
        self._manager = self._make_manager(checkpoint, size)

    def _make_manager(self, checkpoint: Checkpoint, size: CacheSize) -> Any:
        settings: Any = GenerationConfig
        known = signature(ContinuousBatchingConfig).parameters
        # It had another name, and this choice was not there, in transformers 5.17.
        options: dict[str, Any] = {"page_size" if "page_size" in known else "block_size": size.page_tokens}
        if "auto_switch_to_flash" in known:
            # As the model was loaded: flash kernels know no float32, and would be fetched from elsewhere.
            options["auto_switch_to_flash"] = False
        config = ContinuousBatchingConfig(
            **options,
            num_blocks=size.pages,
            max_batch_tokens=size.step_tokens,
            max_requests_per_batch=self._most,
            # Sampling runs between a forward and the next one: neither may be recorded or begun before it.
            use_async_batching=False,
            use_cuda_graph=False,
        )
        self._attention = str(checkpoint.model.config._attn_implementation)
        manager = checkpoint.model.init_continuous_batching(settings(do_sample=False, eos_token_id=-1, pad_token_id=0), config)
        manager.logit_processor = self._rows
        manager.output_router = Outlet(self._made, self._failed)
        return manager

    def __repr__(self) -> str:
        return f"BatchLoop({len(self._running)} running, {len(self._waiting)} waiting, at most {self._limit})"

    def open(self, sequence: TokenSequence) -> None:
        # -1: not known yet.
        sequence.cached_tokens = -1
        with self._lock:
            if self._closing.is_set():
                raise BackendError("the worker is stopping")
            if not self._busy():
                self._stepped_s = time.monotonic()
            self._waiting.push(sequence)
            self._admit()

    def cancel(self, sequence: TokenSequence) -> None:
        sequence.wanted = False
        with self._lock:
            self._waiting.discard(sequence)
            for request, running in self._running.items():
                if running is sequence:
                    self._remove(request)
                    break
            self._admit()

    def age_s(self) -> float:
        return max(0.0, time.monotonic() - self._stepped_s) if self._busy() else 0.0

    def close(self, timeout_s: float = 5.0) -> None:
        with self._lock:
            self._closing.set()
        self._halt()
        if self.is_alive():
            self.join(timeout_s)

    def run(self) -> None:
        """The thread."""
        manager = self._manager
        while not self._closing.is_set():
            manager.background_thread_status.clear()
            with self._lock:
                self._serving = True
                if self._suspect is not None:
                    self._probe = str(next(self._numbers))
                    manager.add_request([0], request_id=self._probe, max_new_tokens=1, streaming=True)
                self._admit()
            if self._closing.is_set():
                self._halt()  # it was cleared above
            try:
                # The library's own start() makes a thread that would keep a process with a hung step from ending.
                manager._run_generation_loop()
                error = manager.background_thread_status.fatal_error
            except Exception as raised:  # noqa: BLE001 - it broke while it was cleaning up
                error = raised
            if self._closing.is_set():
                break
            error = error or BackendError("the batching loop ended by itself")
            # A full memory passes.
            self._breaks = 0 if out_of_memory(error) else self._breaks + 1
            stepped = self._recover(error)
            if self._breaks >= MOST_BREAKS and self.on_death is not None:
                self.on_death(runs_no_more(error))
                break
            # What its frames hold of the step that failed would be missing in the next ones.
            error = None
            if not stepped:
                self._closing.wait(BREAK_S)
        with self._lock:
            left = [*self._running.values(), *self._waiting.clear(), *self._to_try, *self._tried]
            left += [self._suspect[0]] if self._suspect is not None else []
            self._running.clear()
        if self._closing.is_set():
            hand_over((sequence, BackendError("the worker stopped before the answer was complete")) for sequence in left)
        manager.batch_processor = None
        if manager.model.config._attn_implementation != self._attention:
            # It may have been exchanged for one that knows of batches only.
            manager.model.set_attn_implementation(self._attention)

    # --- with the lock ----------------------------------------------------------------------------

    def _busy(self) -> bool:
        return bool(self._running or self._waiting or self._trying or self._suspect)

    def _admit(self) -> None:
        """Let those in that may come."""
        if not self._serving or self._suspect is not None:
            return
        if self._trying:
            while self._to_try and not self._running:
                self._add(self._to_try.popleft())
            if self._running:
                return
            self._trying = False
            self._waiting.push_back(self._tried)
            self._tried.clear()
        places = self._places() if self._waiting else Counter()
        while self._waiting and len(self._running) < self._limit:
            request = self._waiting.least(places)
            self._add(self._waiting.pop(request))
            places[request] += 1
        if not self._running:
            self._limit = self._most

    def _places(self) -> Counter[object]:
        """How many each request has in the batch."""
        return Counter(sequence.request for sequence in self._running.values())

    def _make_room(self) -> None:
        """A request that has no place gets one of those of the request that has the most, if these are several. Between two steps."""
        while self._waiting and len(self._running) >= self._limit:
            places = self._places()
            greedy, most = places.most_common(1)[0]
            poor = self._waiting.least(places)
            if most < 2 or places[poor]:
                break
            # The one that came last: it has made the least, which is computed again when its turn comes.
            request, last = next(each for each in reversed(self._running.items()) if each[1].request is greedy)
            self._remove(request)
            self._add(self._waiting.pop(poor))
            self._waiting.push_back([last])

    def _add(self, sequence: TokenSequence) -> None:
        if not sequence.wanted:
            return
        request = str(next(self._numbers))
        self._running[request] = sequence
        self._manager.add_request(
            sequence.ids, request_id=request, max_new_tokens=sequence.room, streaming=True, eos_token_id=list(sequence.ends)
        )

    def _remove(self, request: str) -> None:
        del self._running[request]
        self._manager.cancel_request(request)

    # --- on the thread ----------------------------------------------------------------------------

    def _began(self, requests: list[str]) -> None:
        self._in_batch = requests
        self._stepped_s = time.monotonic()

    def _made(self, outputs: list[tuple[str, int]]) -> None:
        made: list[tuple[TokenSequence, Token | Exception]] = []
        with self._lock:
            self._stepped_s = time.monotonic()
            self._breaks = 0
            for request, token_id in outputs:
                if request == self._probe:
                    made += self._convict()
                sequence = self._running.get(request)
                if sequence is None:
                    continue
                token = self._rows.chosen.get(request) or Token(token_id)
                made.append((sequence, token))
                if isinstance(token, Exception):
                    self._remove(request)
                elif sequence.add(token):
                    del self._running[request]
                elif self._trying:
                    self._remove(request)
                    self._tried.append(sequence)
            self._admit()
            if not self._trying:
                self._make_room()
                self._grow()
        hand_over(made)

    def _grow(self) -> None:
        self._good_steps += 1
        if self._good_steps >= GROW_STEPS and self._limit < self._most:
            self._good_steps = 0
            self._limit += 1

    def _failed(self, request: str, error: Exception) -> None:
        """One that was not accepted. Where the loop broke, this is called for all: `_recover` sees to them."""
        if self._manager.background_thread_status.local_status != BackgroundThreadStatus.DONT_STOP:
            return
        with self._lock:
            sequence = self._running.pop(request, None)
            self._admit()
        if sequence is not None:
            hand_over([(sequence, error)])

    def _convict(self) -> list[tuple[TokenSequence, Token | Exception]]:
        """The suspect, with what it ends with: it was not the model."""
        convicted: list[tuple[TokenSequence, Token | Exception]] = [] if self._suspect is None else [self._suspect]
        self._suspect = None
        return convicted

    def _recover(self, error: Exception) -> bool:
        """The loop broke; returns whether a step of sequences had begun in it. Nothing is in the batch any more."""
        log.error("a step failed", batch=len(self._in_batch), exc_info=error)
        failed: list[tuple[TokenSequence, Token | Exception]] = []
        with self._lock:
            stepped = bool(self._in_batch) and self._suspect is None
            self._serving = False
            self._good_steps = 0
            suspects = [self._running.pop(request) for request in self._in_batch if request in self._running]
            # Broken before its first forward, or between two: it may have been any of them.
            suspects = suspects or list(self._running.values())
            others = [sequence for sequence in self._running.values() if sequence not in suspects]
            for request in self._in_batch:
                self._manager.cancel_request(request)
            for request in self._running:
                self._manager.cancel_request(request)
            self._running.clear()
            self._waiting.push_back(others)
            self._in_batch = []
            if self._suspect is not None:
                # The probe broke it, too.
                failed = self._convict() if out_of_memory(error) else []
            elif len(suspects) == 1:
                self._suspect = suspects[0], error.with_traceback(None)
                failed = self._convict() if self.on_death is None else []
            elif suspects:
                self._trying = True
                self._to_try.extend(suspects)
                self._limit = (len(suspects) + 1) // 2 if self._broke_before(suspects) else self._limit
        hand_over(failed)
        return stepped

    def _broke_before(self, suspects: list[TokenSequence]) -> bool:
        """Whether each of them has run alone since the loop broke for the last time: then it is their number that breaks it."""
        tried = all(sequence.trials for sequence in suspects)
        for sequence in suspects:
            sequence.trials += 1
        return tried

    def _halt(self) -> None:
        self._manager.background_thread_status.request_stop(BackgroundThreadStatus.HARD_STOP, 0)
        self._manager.cancel_request("")  # of none: it wakes the loop up
