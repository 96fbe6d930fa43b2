"""What transformers' continuous batching calls in each step of ours: before the forward, with its logits, and with what came out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import ContinuousBatchingLogitsProcessorList
from transformers.generation.continuous_batching.continuous_api import OutputRouter

from .sequences import Token, TokenSequence

Chosen = dict[str, Token | Exception]
"""What was chosen for requests in this step, by their ids, or why nothing could be."""


class RowSampling(ContinuousBatchingLogitsProcessorList):
    """Lets each sequence choose its own token from its row of the logits, with the code and the draws that it has without a batch.

    A row whose token is simply the likeliest is left to the argmax that follows. `sequences` by request id; `began` is called
    before each forward with the ids of the requests in it. A sequence that cannot choose fails alone.
    """

    def __init__(self, sequences: Mapping[str, TokenSequence], began: Callable[[list[str]], None]) -> None:
        super().__init__(LogitsProcessorList())
        self.do_processing = True
        self.chosen: Chosen = {}
        self._sequences = sequences
        self._began = began
        self._rows: list[str] = []

    def prepare_tensor_args(self, requests_in_batch: list[Any], arg_storage: torch.Tensor) -> torch.Tensor:
        self.chosen.clear()
        self._rows = [each.state.request_id for each in requests_in_batch if each.has_new_token]
        for each in requests_in_batch:
            state = each.state
            sequence = self._sequences.get(state.request_id)
            # The first piece of a prompt begins behind what other requests left in the cache.
            if sequence is not None and sequence.cached_tokens < 0:
                sequence.cached_tokens = state.position_offset - each.query_length
        self._began([each.state.request_id for each in requests_in_batch])
        return arg_storage

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, logits_processor_args: torch.Tensor) -> torch.Tensor:  # noqa: ARG002 - the interface
        for row, request in enumerate(self._rows):
            sequence = self._sequences.get(request)
            if sequence is None or sequence.plain:
                continue
            try:
                token = sequence.choose(scores[row : row + 1])
            except Exception as error:  # noqa: BLE001 - whatever it is, it belongs to this request
                self.chosen[request] = error
            else:
                self.chosen[request] = token
                # All that follows is an argmax over the row.
                scores[row] = 0
                scores[row, token.token_id] = 1
        return scores


class Outlet(OutputRouter):
    """Takes what a step made of all requests in one call, instead of a queue or a callback for each.

    `made` gets (request id, token id) pairs; `failed` gets the id of a request that was not accepted, or that was there when the loop
    broke, and the cause.
    """

    def __init__(self, made: Callable[[list[tuple[str, int]]], None], failed: Callable[[str, Exception], None]) -> None:
        super().__init__()
        self._made = made
        self._failed = failed

    def deliver_batch(self, outputs: list[Any]) -> None:
        self._made([(output.request_id, output.generated_tokens[-1]) for output in outputs])

    def fail_and_deliver(self, state: Any, error: Exception) -> None:
        self._failed(state.request_id, error)
