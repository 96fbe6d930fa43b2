"""What is not wanted any more ends at once, and makes room."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest

from tests.processes import eventually
from zmqserve.errors import DeadlineExceeded
from zmqserve.messages import Cancel

from .cases import case
from .network import Network
from .wire import Received, chunks_of

LONG = 1000
"""Tokens of an answer that nobody waits for: seconds of work at least."""
FEW = 8
"""Chunks that may be under way when a cancel arrives, on a busy machine."""
AT_ONCE_S = 3.0


def running(network: Network) -> int:
    """Requests on the worker, as its controller counts them."""
    return network.client.status().workers[0].running


@case("cancel ends the answer within a step or two: cancelled")
def test_a_cancelled_answer_ends(network: Network) -> None:
    with network.wire() as wire:
        request = wire.request(network.subject.prompts.story, temperature=0, max_tokens=LONG)
        wire.send(request)
        chunks: list[Any] = []
        while len(chunks) < 3 or wire.waiting():
            chunks += chunks_of(wire.next())
        before = len(chunks)
        wire.send(Cancel(request.rid))
        (ended,) = wire.rest(request.rid, chunks=chunks)
    assert isinstance(ended, Received), ended
    assert ended.reasons == ["cancelled"]
    assert len(ended.pieces) - before <= FEW
    assert [piece.seq for piece in ended.pieces] == list(range(len(ended.pieces)))
    if "ids" not in network.subject.lacks:
        assert ended.usage.completion_tokens == len(ended.ids)


@case("a closed stream frees its slot, and who waited for it is answered")
def test_a_closed_stream_makes_room(network: Network) -> None:
    story = network.subject.prompts.story
    expected = network.greedy(story, 4)
    slots = network.client.status().workers[0].slots
    with ExitStack() as stack:
        streams = [stack.enter_context(network.open(story, temperature=0, max_tokens=LONG)) for _ in range(slots)]
        for stream in streams:
            next(stream)
        late = stack.enter_context(network.open(story, temperature=0, max_tokens=4))
        streams[0].close()
        assert late.text() == expected.text
        assert running(network) == slots - 1
    eventually(lambda: running(network) == 0, AT_ONCE_S, "all slots free")


@case("a deadline ends the answer and frees its slot")
def test_a_deadline_ends_the_answer(network: Network) -> None:
    subject = network.subject
    stream = network.client.generate(subject.model, subject.prompts.story, temperature=0, max_tokens=LONG, timeout_s=0.5)
    with pytest.raises(DeadlineExceeded):
        stream.text()
    eventually(lambda: running(network) == 0, AT_ONCE_S, "its slot free")
