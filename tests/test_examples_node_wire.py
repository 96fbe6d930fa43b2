"""The worker in Node, frame by frame: the test is its controller, so that what depends on the order of messages is no matter of luck."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Self

import msgspec
import pytest
import zmq

from zmqserve import messages as m
from zmqserve.params import SamplingParams

from .nodes import needs_node, node, running
from .processes import PATIENCE_S

pytestmark = needs_node

EPOCH = 0x0123_4567_89AB_CDEF


class Silence(AssertionError):
    """Nothing came of what was waited for."""


class Told:
    """A ROUTER that says what a controller would, and reads what the worker says."""

    def __init__(self, *, ttl_ms: int = 60_000) -> None:
        self.ttl_ms = ttl_ms
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        port = self.socket.bind_to_random_port("tcp://127.0.0.1")
        self.endpoint = f"tcp://127.0.0.1:{port}"
        self.worker = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        self.context.term()

    def say(self, kind: int, *fields: object, epoch: int = EPOCH, payload: bytes = b"") -> None:
        self.socket.send_multipart([self.worker, msgspec.msgpack.encode([kind, epoch, *fields]), payload])

    def hear(self, *kinds: int, within_s: float = PATIENCE_S) -> tuple[list[Any], bytes, bytes]:
        """The next head of these kinds (decoded and as bytes) and its payload; others, like LOAD, are passed over."""
        until = time.monotonic() + within_s
        while self.socket.poll(max(0, int((until - time.monotonic()) * 1000))):
            self.worker, head, payload = self.socket.recv_multipart()
            fields = msgspec.msgpack.decode(head)
            if fields[0] in kinds:
                return fields, head, payload
        raise Silence(f"nothing of {kinds} within {within_s} s")

    def welcome(self, epoch: int = EPOCH) -> m.Ready:
        """Answer the next READY."""
        _, _, payload = self.hear(m.READY)
        self.say(m.WELCOME, epoch=epoch, payload=msgspec.msgpack.encode([1, "told", self.ttl_ms]))
        return msgspec.msgpack.decode(payload, type=m.Ready)

    def ask(self, rid: int, prompt: str, *, client: int = 7, stream: bool = True) -> None:
        request = m.Generate(rid=rid, model="m", prompt=prompt, params=SamplingParams(), stream=stream)
        self.say(m.REQUEST, client, rid, payload=msgspec.msgpack.encode(request))


def worker(controller: Told, *arguments: object, **options: Any) -> AbstractContextManager[subprocess.Popen[bytes]]:
    command = ("echo_worker.mjs", "--controller", controller.endpoint, "--model", "m", "--name", "nw")
    return running(node(*command, *arguments, **options))


@contextmanager
def told(*arguments: object, ttl_ms: int = 60_000) -> Iterator[Told]:
    """A worker in Node with model m, registered."""
    with Told(ttl_ms=ttl_ms) as controller:
        with worker(controller, *arguments):
            assert controller.welcome().name == "nw"
            controller.hear(m.LOAD)
            yield controller


def chunks_of(payload: bytes) -> list[m.Chunk]:
    message = msgspec.msgpack.decode(payload, type=m.Chunk | m.Chunks)
    return message.chunks if isinstance(message, m.Chunks) else [message]


def test_an_answer_is_first_more_and_done_with_the_head_of_more_in_its_canonical_form() -> None:
    with told() as controller:
        controller.ask(2**62, "a b c")
        head, _, payload = controller.hear(m.FIRST)
        assert head == [m.FIRST, EPOCH, 7, 2**62]
        assert [chunk.text for chunk in chunks_of(payload)] == ["a"]
        _, more, payload = controller.hear(m.MORE)
        assert more == m.more_head(EPOCH, 7)
        assert [(chunk.seq, chunk.text) for chunk in chunks_of(payload)] == [(1, " b")]
        head, _, payload = controller.hear(m.DONE)
        assert head == [m.DONE, EPOCH, 7, 2**62, "stop", 0, 3, 3]
        done = msgspec.msgpack.decode(payload, type=m.Done)
        assert done.last is not None
        assert (done.seq, done.last.seq, done.last.text) == (2, 2, " c")


def test_an_answer_of_one_chunk_is_one_message() -> None:
    with told() as controller:
        controller.ask(5, "alone")
        head, _, payload = controller.hear(m.FIRST, m.MORE, m.DONE)
        assert head[0] == m.DONE
        done = msgspec.msgpack.decode(payload, type=m.Done)
        assert done.last is not None
        assert (done.seq, done.last.text) == (0, "alone")


def test_what_one_step_makes_for_a_client_is_gathered() -> None:
    with told() as controller:
        words = " ".join("abcdefgh")
        controller.ask(1, words)
        controller.ask(2, words)
        texts = {1: "", 2: ""}
        gathered, ended = 0, 0
        while ended < 2:
            head, _, payload = controller.hear(m.FIRST, m.MORE, m.DONE)
            if head[0] == m.DONE:
                last = msgspec.msgpack.decode(payload, type=m.Done).last
                assert last is not None
                texts[last.rid] += last.text
                assert texts[last.rid] == words
                ended += 1
                continue
            chunks = chunks_of(payload)
            gathered = max(gathered, len(chunks))
            for chunk in chunks:
                texts[chunk.rid] += chunk.text
        assert gathered == 2


def test_a_full_worker_is_busy() -> None:
    with told("--slots", 1, "--step-ms", 50) as controller:
        controller.ask(1, "a b c")
        controller.ask(2, "d e f")
        head, _, payload = controller.hear(m.BUSY)
        assert (head, payload) == ([m.BUSY, EPOCH, 7, 2], b"")
        assert controller.hear(m.DONE)[0][3] == 1


def test_a_reregister_ends_what_runs_in_silence() -> None:
    with told("--step-ms", 20) as controller:
        controller.ask(1, "word " * 100)
        controller.hear(m.FIRST)
        controller.say(m.REREGISTER, epoch=2**61)
        head, _, _ = controller.hear(m.READY)
        assert head == [m.READY, 2**61]
        controller.say(m.WELCOME, epoch=2, payload=msgspec.msgpack.encode([1, "told", 60_000]))
        controller.say(m.REQUEST, 7, 4, epoch=EPOCH, payload=b"of a former life")
        controller.say(m.REQUEST, 7, 3, epoch=2, payload=b"\xc1")
        head, _, payload = controller.hear(m.FIRST, m.MORE, m.DONE, m.FAILED)  # the next word is of the new life
        assert head[:6] == [m.FAILED, 2, 7, 3, "", 40001]
        assert msgspec.msgpack.decode(payload, type=m.Error).rid == 3
        request = m.Generate(rid=5, model="m", prompt="a b c d")
        controller.say(m.REQUEST, 7, 5, epoch=2, payload=msgspec.msgpack.encode(request))
        while (heard := controller.hear(m.FIRST, m.MORE, m.DONE))[0][0] != m.DONE:
            assert {chunk.rid for chunk in chunks_of(heard[2])} == {5}


@pytest.mark.parametrize("payload", [b"", b"\xc0", b"\x90", b"\x92\x02\x03", msgspec.msgpack.encode([77, 3, "m"]), b"\xc1" * 100])
def test_a_payload_that_cannot_be_read_fails_alone(payload: bytes) -> None:
    with told() as controller:
        controller.say(m.REQUEST, 7, 3, payload=payload)
        assert controller.hear(m.FAILED)[0] == [m.FAILED, EPOCH, 7, 3, "", 40001]
        controller.socket.send_multipart([controller.worker, b"\xc1", b""])
        controller.socket.send_multipart([controller.worker, b"one frame"])
        controller.say(120)  # of a newer controller
        controller.ask(4, "a")
        assert controller.hear(m.DONE)[0][3] == 4


def test_while_the_controller_is_silent_what_is_said_is_held() -> None:
    with told("--step-ms", 20, ttl_ms=1500) as controller:
        controller.ask(1, " ".join(["word"] * 200))  # 4 s
        asked_s = time.monotonic()
        chunks = chunks_of(controller.hear(m.FIRST)[2])
        try:
            while True:
                chunks += chunks_of(controller.hear(m.MORE, within_s=1.0)[2])
        except Silence:
            pass
        assert time.monotonic() - asked_s > 1.2
        assert len(chunks) < 199
        while len(chunks) < 199:
            controller.say(m.BEAT)
            chunks += chunks_of(controller.hear(m.MORE)[2])
        assert [chunk.seq for chunk in chunks] == list(range(199))
        assert controller.hear(m.DONE)[0][3] == 1


def test_a_head_and_a_request_that_disagree_are_malformed() -> None:
    with told() as controller:
        request = m.Generate(rid=3, model="m", prompt="a")
        controller.say(m.REQUEST, 7, 4, payload=msgspec.msgpack.encode(request))
        assert controller.hear(m.FAILED)[0][:6] == [m.FAILED, EPOCH, 7, 4, "", 40001]


def test_a_resume_is_lost_for_good_and_extra_is_refused() -> None:
    with told() as controller:
        lost = m.Generate(rid=3, model="m", prompt="a b", resume=m.Resume(b"\0\0\0\0", 1, 1))
        controller.say(m.REQUEST, 7, 3, payload=msgspec.msgpack.encode(lost))
        head, _, payload = controller.hear(m.FAILED)
        assert (head[5], msgspec.msgpack.decode(payload, type=m.Error).retryable) == (50007, False)
        controller.say(m.REQUEST, 7, 4, payload=msgspec.msgpack.encode([3, 4, "m", 0, None, None, 0, None, None, ["a"], {}, {"task": 1}]))
        assert controller.hear(m.FAILED)[0][5] == 40304


def test_an_answer_too_long_for_a_message_fails_alone() -> None:
    with Told() as controller:
        with worker(controller):
            controller.hear(m.READY)
            controller.say(m.WELCOME, payload=msgspec.msgpack.encode([1, "told", 60_000, "", 1000]))
            controller.ask(1, "word " * 300, stream=False)
            assert controller.hear(m.DONE, m.FAILED)[0][:6] == [m.FAILED, EPOCH, 7, 1, "", 50001]
            controller.ask(2, "a", stream=False)
            assert controller.hear(m.DONE, m.FAILED)[0][0] == m.DONE


def test_a_worker_that_drains_finishes_and_does_not_register_again() -> None:
    with Told() as controller:
        with running(
            node("echo_worker.mjs", "--controller", controller.endpoint, "--model", "m", "--name", "nw", "--step-ms", 20)
        ) as process:
            controller.welcome()
            controller.ask(1, "a b c d e")
            controller.hear(m.FIRST)
            controller.say(m.DRAIN, 0, 0, 20_000)
            controller.hear(m.DRAINING)
            controller.ask(2, "late")
            counting = m.CountTokens(rid=3, model="m", prompt="a b")
            controller.say(m.REQUEST, 7, 3, payload=msgspec.msgpack.encode(counting))  # takes no slot, so BUSY is no answer to it
            assert controller.hear(m.BUSY, m.DONE)[0] == [m.BUSY, EPOCH, 7, 2]
            assert controller.hear(m.BUSY, m.DONE)[0][:4] == [m.DONE, EPOCH, 7, 3]
            assert controller.hear(m.DONE)[0][3] == 1
            assert controller.hear(m.BYE, m.READY)[0] == [m.BYE, EPOCH]
            assert process.wait(PATIENCE_S) == 0


def test_a_refused_worker_ends_and_says_why() -> None:
    with Told() as controller:
        with worker(controller, stderr=subprocess.PIPE) as process:
            controller.hear(m.READY)
            controller.say(m.REFUSED, epoch=0, payload=msgspec.msgpack.encode([40003, "it speaks another version"]))
            _, said = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 1
        assert b"ProtocolMismatch: it speaks another version" in said
