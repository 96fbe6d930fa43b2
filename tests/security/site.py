"""A controller process with an honest worker and an honest client, for hostile peers to be let loose on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bench.chaos_oracle import Oracle
from bench.soak_churn import Keys
from bench.zmtp import RawPeer
from tests.processes import ANY, PATIENCE_S, Served, ServedController, eventually
from zmqserve import Client
from zmqserve import messages as m
from zmqserve.stream import Stream

WORDS = ["one", "two", "three", "four", "five"]
TOKENS = 40
MESSAGE_BYTES = 2**20
NAME = "honest"
TRIES, TRY_S = 50, 0.2
AGAIN_S = 1.0
"""After which a worker repeats a READY that was not answered."""
SETTINGS = {"message_bytes": MESSAGE_BYTES, "client_requests": 20, "queue_requests": 50}

_to_client = m.decoder(m.ToClient)
_heads = m.decoder(m.ControllerHead)
_refusals = m.decoder(m.Refused)


class RawClient(RawPeer):
    """A client's side of the wire, without an SDK or libzmq."""

    def say(self, *messages: Any) -> None:
        """Send each as a message of one frame: a message of the protocol, or bytes."""
        for each in messages:
            self.send(each if isinstance(each, bytes) else m.encode(each))

    def hear(self) -> Any:
        """The next message."""
        return _to_client.decode(self.recv()[-1])

    def answer(self, message: Any) -> Any:
        """What comes for a message."""
        self.say(message)
        return self.hear()

    def is_served(self) -> bool:
        """Whether this connection still gets answers, and none was owed to it before."""
        return isinstance(self.answer(m.Hello(m.PROTOCOL)), m.Welcome)


class RawWorker(RawPeer):
    """A worker's side of the wire. `epoch` is the one of its last WELCOME, or the number of its last REREGISTER."""

    epoch = 0

    def say(self, kind: int, payload: Any = b"", *more: bytes, epoch: int | None = None, **fields: Any) -> None:
        """Send a head and a payload, and frames too many."""
        head = m.WorkerHead(kind, self.epoch if epoch is None else epoch, **fields)
        self.send(m.encode(head), payload if isinstance(payload, bytes) else m.encode(payload), *more)

    def hear(self, *kinds: int) -> tuple[m.ControllerHead, bytes]:
        """The next message of one of these kinds (of any but a beat, without)."""
        while True:
            head_bytes, payload = self.recv()
            head = _heads.decode(head_bytes)
            if head.kind in (m.WELCOME, m.REREGISTER):
                self.epoch = head.epoch
            if head.kind in kinds or (not kinds and head.kind != m.BEAT):
                return head, payload

    def register(self, offer: Any = None) -> tuple[m.ControllerHead, bytes]:
        """Say READY with this offer; returns what was answered: WELCOME or REFUSED.

        Where the controller cannot be certain who sent it (frames of others came before), it asks for it again with a number, or, of who is
        registered, drops it: so it is said again after a while, as by each worker.
        """
        offer = ready() if offer is None else offer
        for _ in range(TRIES):
            self.say(m.READY, offer, epoch=0)
            with self._within(AGAIN_S), suppress(TimeoutError):
                while (told := self.hear(m.WELCOME, m.REFUSED, m.REREGISTER))[0].kind == m.REREGISTER:
                    self.say(m.READY, offer)
                return told
        raise AssertionError("its READY is not answered")

    def is_fenced(self, act: Callable[[], None]) -> bool:
        """Whether it is told to register again when it does so. A frame that fits nowhere may be anybody's while others send, too: then
        it is dropped, and nobody is blamed; so it is done some times."""
        for _ in range(TRIES):
            act()
            with self._within(TRY_S), suppress(TimeoutError):
                return self.hear(m.REREGISTER)[0].kind == m.REREGISTER
        return False

    @contextmanager
    def _within(self, timeout_s: float) -> Iterator[None]:
        before_s = self.socket.gettimeout()
        self.socket.settimeout(timeout_s)
        try:
            yield
        finally:
            self.socket.settimeout(before_s)

    def refusal(self, offer: Any) -> m.Refused:
        """Say READY, which must be refused."""
        head, payload = self.register(offer)
        assert head.kind == m.REFUSED
        refused: m.Refused = m.read(_refusals, payload)
        return refused


def ready(name: str = "hostile", *models: m.ModelCard, protocol: int = m.PROTOCOL, slots: int = 4, state: str = "ready") -> m.Ready:
    """A worker's offer; without models it serves ``hostile model``."""
    cards = list(models) or [m.ModelCard("hostile model", verbs=["generate"])]
    return m.Ready(protocol, name, "raw", state, cards, slots, 1.0, 30_000)


class Honest:
    """A stream that goes on while others do harm."""

    def __init__(self, stream: Stream, tokens: int) -> None:
        self.stream = stream
        self.oracle = Oracle(WORDS, tokens)

    @property
    def rid(self) -> int:
        """Its request's, as somebody might have guessed it."""
        return self.stream.rid

    def read(self, most: int | None = None) -> None:
        """Read on, to the end or for so many chunks, and check each."""
        for count, chunk in enumerate(self.stream, 1):
            self.oracle.chunk(chunk.seq, chunk.text, chunk.token_ids)
            if count == most:
                return
        whole = self.stream.completion
        usage = (whole.usage.prompt_tokens, whole.usage.completion_tokens)
        self.oracle.end(whole.text, whole.token_ids, whole.finish_reason, usage)


class Site:
    """Who is there: the processes of the controller and of its honest worker."""

    def __init__(self, controller: ServedController, worker: Served, keys: Keys | None) -> None:
        self.controller = controller
        self.worker = worker
        self.keys = keys
        self._raw_workers = 0

    def open_client(self, name: str = "") -> Client:
        """The honest client, or one with the key of that name where there are keys."""
        options: Any = {} if self.keys is None else self.keys.options(name or self.keys.client)
        return Client(self.controller.clients, timeout_s=PATIENCE_S, **options)

    @contextmanager
    def honest_stream(self, tokens: int = TOKENS) -> Iterator[Honest]:
        """A stream that has begun; at the end it must have come whole, token by token, without help of a resume or a retry."""
        options: dict[str, Any] = {"max_tokens": tokens, "timeout_s": PATIENCE_S, "retries": 0, "resume": False}
        with self.open_client() as client, client.generate("m", " ".join(WORDS), **options) as stream:
            honest = Honest(stream, tokens)
            honest.read(2)
            yield honest
            honest.read()
            assert not honest.oracle.wrong
        assert self.controller.process.poll() is None

    @contextmanager
    def raw_client(self, **options: Any) -> Iterator[RawClient]:
        """A connection to the clients' socket."""
        with RawClient(self.controller.clients, **options) as peer:
            yield peer

    @contextmanager
    def raw_worker(self, **options: Any) -> Iterator[RawWorker]:
        """A connection to the workers' socket. What such have registered is gone when the last of them ends."""
        self._raw_workers += 1
        with RawWorker(self.controller.workers, **options) as peer:
            yield peer
        self._raw_workers -= 1
        if not self._raw_workers:
            eventually(lambda: self.workers() == [NAME], PATIENCE_S, "the hostile worker is forgotten")

    def workers(self) -> list[str]:
        """Names of those registered."""
        return sorted(worker.name for worker in self.status().workers)

    def counter(self, name: str) -> int:
        """One of the controller's counters."""
        return self.status().counters.get(name, 0)

    def status(self) -> m.ControllerStatus:
        """The controller's."""
        with self.open_client("" if self.keys is None else self.keys.admin) as client:
            return client.status()


@contextmanager
def open_site(config: Path, keys: Keys | None = None) -> Iterator[Site]:
    """A controller with SETTINGS in this file, to be written, and its worker, ready; with keys, where there are some."""
    config.write_text("".join(f"{name} = {value}\n" for name, value in SETTINGS.items()))
    guarded = [] if keys is None else ["--curve-dir", str(keys.folder)]
    known = [] if keys is None else keys.arguments(keys.worker, "workers")
    with ServedController(ANY, ANY, "--config", str(config), *guarded) as controller:
        with controller.echo(NAME, "--delay-per-token", "0.01", *known) as worker:
            controller.wait_ready(NAME)
            yield Site(controller, worker, keys)
