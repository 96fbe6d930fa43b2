"""What may be tried where keys are asked for: without one, with another's, with one that allows less, and with what was overheard."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Self

import pytest
import zmq
from zmq.utils.monitor import recv_monitor_message

from bench.soak_churn import Keys
from bench.zmtp import COMMAND, RawPeer, frame, greeting, message, ready
from tests.processes import PATIENCE_S, eventually
from zmqserve import Client
from zmqserve import messages as m
from zmqserve.certificate import read_pair, read_public, write_pair
from zmqserve.errors import InvalidParameter, PermissionDenied, QuotaExceeded, RateLimited, Refused, Unauthenticated

from .site import NAME, Site
from .site import ready as offer

pytestmark = pytest.mark.usefixtures("honest_with_key")

SOON_S = 5.0
SIDES = ("clients", "workers")
each_side = pytest.mark.parametrize("side", SIDES)
NO_RULES = "[defaults]\n"
DENIED = 400
"""ZAP's status for who is not let in."""


@pytest.fixture
def keys(guarded_site: Site) -> Keys:
    assert guarded_site.keys is not None
    return guarded_site.keys


@contextmanager
def rules(site: Site, text: str) -> Iterator[None]:
    """These rules, for as long as this lasts."""
    assert site.keys is not None
    path = site.keys.folder / "access.toml"
    for content in (text, NO_RULES):
        path.write_text(content)
        site.controller.send(signal.SIGHUP)
        site.controller.wait_for("keys changed", rules=True)
        if content is text:
            yield


class Curved:
    """A libzmq socket that connects with a pair of keys, and tells what became of its handshake."""

    def __init__(self, site: Site, side: str, pair: str, server: str | None = None, identity: bytes = b"") -> None:
        assert site.keys is not None
        own = read_pair(site.keys.pairs / f"{pair}.key_secret")
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        if identity:
            self.socket.setsockopt(zmq.IDENTITY, identity)
        self.socket.setsockopt(zmq.RCVTIMEO, int(1000 * PATIENCE_S))
        self.socket.curve_publickey, self.socket.curve_secretkey = own.public, own.secret
        self.socket.curve_serverkey = read_public(site.keys.folder / f"{server or side}-port.key").encode()
        self._monitor = self.socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        )
        self.socket.connect(getattr(site.controller, side))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.disable_monitor()
        self._monitor.close(0)
        self.socket.close(0)
        self._context.term()

    def outcome(self) -> int:
        """The handshake's: the ZAP status of one that was refused, 200 of one that was not, 0 for one that was cut off."""
        assert self._monitor.poll(int(1000 * SOON_S)), "the handshake has no end"
        event: Any = recv_monitor_message(self._monitor)
        if event["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            return 200
        return int(event["value"]) if event["event"] == zmq.EVENT_HANDSHAKE_FAILED_AUTH else 0

    def refusal(self, ready_: m.Ready) -> m.Refused:
        """What comes for a worker's offer that is refused. It is repeated with the number that the controller may ask for."""
        number = 0
        while True:
            self.socket.send_multipart([m.encode(m.WorkerHead(m.READY, number)), m.encode(ready_)])
            head_bytes, payload = self.socket.recv_multipart()
            head: m.ControllerHead = m.read(m.decoder(m.ControllerHead), head_bytes)
            if head.kind != m.REREGISTER:
                assert head.kind == m.REFUSED, head
                refused: m.Refused = m.read(m.decoder(m.Refused), payload)
                return refused
            number = head.epoch

    def answer(self, said: Any) -> Any:
        """What comes for a client's message."""
        self.socket.send(m.encode(said))
        return m.read(m.decoder(m.ToClient), self.socket.recv())


def let_in(site: Site, side: str) -> str:
    """A new key; returns its name. libzmq does not connect again by itself once a key was refused: so the controller knows it by then."""
    assert site.keys is not None
    name = site.keys.add(side)
    site.controller.send(signal.SIGHUP)

    def is_known() -> bool:
        with Curved(site, side, name) as peer:
            return peer.outcome() == 200

    eventually(is_known, PATIENCE_S, f"the controller knows {name}")
    return name


# --- the door


@each_side
@pytest.mark.parametrize("said", [greeting() + ready(), b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\0\1\0\1\xfc\3\3", b"\1\0"])
def test_no_key_is_no_way_in(guarded_site: Site, side: str, said: bytes) -> None:
    """Nor an old version of the protocol, which has no handshake at all."""
    with RawPeer(getattr(guarded_site.controller, side), handshake=False) as peer:
        peer.write(said)
        assert peer.ends(SOON_S)


@each_side
@pytest.mark.parametrize("body", [b"", b"\x05HELLO", b"\x05HELLO" + bytes(194), b"\x08INITIATE" + bytes(300), b"\x07MESSAGE" + bytes(50)])
def test_a_handshake_made_up_ends_the_connection(guarded_site: Site, side: str, body: bytes) -> None:
    with RawPeer(getattr(guarded_site.controller, side), handshake=False) as peer:
        peer.write(greeting(b"CURVE"), frame(body, COMMAND), message(m.encode(m.Hello(m.PROTOCOL))))
        assert peer.ends(SOON_S)


def test_a_wrong_key_is_told_so_by_its_sdk(guarded_site: Site, keys: Keys) -> None:
    write_pair(keys.pairs, "stranger")
    with guarded_site.open_client("stranger") as client, pytest.raises(Unauthenticated):
        client.models()


@pytest.mark.parametrize(("pair", "side"), [("client", "workers"), ("admin", "workers"), ("worker", "clients")])
def test_a_key_opens_the_socket_of_its_role_only(guarded_site: Site, keys: Keys, pair: str, side: str) -> None:
    with Curved(guarded_site, side, getattr(keys, pair)) as peer:
        assert peer.outcome() == DENIED


@each_side
def test_the_other_sockets_key_is_not_this_ones(guarded_site: Site, keys: Keys, side: str) -> None:
    other = SIDES[side == "clients"]
    with Curved(guarded_site, side, keys.client if side == "clients" else keys.worker, server=other) as peer:
        assert peer.outcome() == 0


def test_a_handshake_that_was_overheard_is_worth_nothing(guarded_site: Site, keys: Keys) -> None:
    """All that an honest client said, byte by byte, said once more: the controller's part of the keys is another, and nothing is taken."""
    with _overhear(guarded_site, keys) as said, RawPeer(guarded_site.controller.clients, handshake=False) as peer:
        assert len(said) > 500
        peer.write(said)
        assert peer.ends(SOON_S)


@contextmanager
def _overhear(site: Site, keys: Keys) -> Iterator[bytes]:
    """What a client says over the wire to ask for the models."""
    heard = bytearray()
    host, _, port = site.controller.clients.removeprefix("tcp://").rpartition(":")
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection((host, int(port))) as onward:

        def pass_on(source: socket.socket, target: socket.socket, keep: bytearray | None) -> None:
            with suppress(OSError):
                while data := source.recv(1 << 16):
                    if keep is not None:
                        keep += data
                    target.sendall(data)

        options: Any = keys.options(keys.client)
        with Client(f"tcp://127.0.0.1:{server.getsockname()[1]}", **options) as client:
            there: list[socket.socket] = []
            threads = [threading.Thread(target=lambda: there.append(server.accept()[0]))]
            threads[0].start()
            asking = threading.Thread(target=client.models)
            asking.start()
            threads[0].join(PATIENCE_S)
            threads += [
                threading.Thread(target=pass_on, args=(there[0], onward, heard)),
                threading.Thread(target=pass_on, args=(onward, there[0], None)),
            ]
            for thread in threads[1:]:
                thread.start()
            asking.join(PATIENCE_S)
        for end in (*there, onward):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        for thread in threads:
            thread.join(PATIENCE_S)
        for end in there:
            end.close()
        yield bytes(heard)


def test_a_revoked_keys_open_connection_is_answered_and_dropped(guarded_site: Site, keys: Keys) -> None:
    name = let_in(guarded_site, "clients")
    with Curved(guarded_site, "clients", name) as peer:
        assert isinstance(peer.answer(m.Hello(m.PROTOCOL)), m.Welcome)
        keys.revoke("clients", name)
        guarded_site.controller.send(signal.SIGHUP)
        guarded_site.controller.wait_for("keys changed", revoked=[name])
        for said in (m.Generate(7, "m", prompt="hi"), m.Status(7), m.ListModels(7)):
            told = peer.answer(said)
            assert (type(told), told.rid, told.code) == (m.Error, 7, Unauthenticated.code)
    with guarded_site.open_client(name) as client, pytest.raises(Unauthenticated):
        client.models()


# --- what a key that was let in may not do


def test_a_worker_may_offer_what_its_key_may_serve_and_no_more(guarded_site: Site, keys: Keys) -> None:
    text = f'[keys.{keys.worker}]\nmodels = ["m"]\nnames = ["{NAME}"]\n'
    with rules(guarded_site, text):
        for ready_ in (
            offer("evil", m.ModelCard("m")),
            offer(NAME, m.ModelCard("secret")),
            offer(NAME, m.ModelCard("m", aliases=["secret"])),
        ):
            with Curved(guarded_site, "workers", keys.worker) as worker:
                refused = worker.refusal(ready_)
                assert refused.code == Refused.code
                assert keys.worker in refused.why
        assert guarded_site.workers() == [NAME]


def test_a_model_that_a_key_may_not_use_and_one_that_is_not_are_the_same(guarded_site: Site, keys: Keys) -> None:
    name = keys.add("clients")
    text = f'[keys.{name}]\nallow = ["other*:*", "*:models", "*:status"]\n'
    with rules(guarded_site, text), Curved(guarded_site, "clients", name) as peer:
        told = [peer.answer(m.Generate(7, model, prompt="hi")) for model in ("m", "w")]
        assert {each.code for each in told} == {PermissionDenied.code}
        assert told[0].message.replace("'m'", "'w'") == told[1].message
        assert peer.answer(m.ListModels(7)).models == []


def test_a_client_is_no_admin(guarded_site: Site, keys: Keys) -> None:
    with Curved(guarded_site, "clients", keys.client) as peer:
        assert peer.answer(m.Drain(7, NAME)).code == PermissionDenied.code
        assert peer.answer(m.Status(7)).status.running <= 1
    assert guarded_site.workers() == [NAME]


def test_over_its_rate_and_over_its_tokens_a_key_is_told_when_to_come_again(guarded_site: Site, keys: Keys) -> None:
    fast, thirsty = keys.add("clients"), keys.add("clients")
    text = f"[keys.{fast}]\nrequests_per_s = 0.1\n[keys.{thirsty}]\ntokens_per_s = 0.1\n"
    with rules(guarded_site, text):
        for name, error in ((fast, RateLimited), (thirsty, QuotaExceeded)):
            with Curved(guarded_site, "clients", name) as peer:
                assert isinstance(peer.answer(m.Generate(7, "m", stream=False, prompt="a b c d")), m.Reply)
                told = peer.answer(m.Generate(8, "m", stream=False, prompt="a b c d"))
                assert (told.code, told.retryable) == (error.code, True)
                assert told.retry_after_ms > 1000


def test_no_key_sees_or_ends_what_is_anothers(guarded_site: Site) -> None:
    name = let_in(guarded_site, "clients")
    with guarded_site.honest_stream(tokens=100) as honest, Curved(guarded_site, "clients", name) as peer:
        peer.socket.send(m.encode(m.Cancel(honest.rid)))
        assert peer.answer(m.Ping(3000, [honest.rid])).unknown == [honest.rid]


def test_a_flood_of_refused_handshakes_keeps_nobody_out(guarded_site: Site) -> None:
    for _ in range(100):
        with RawPeer(guarded_site.controller.clients, handshake=False) as peer:
            peer.write(greeting(b"CURVE"), frame(b"\x05HELLO" + bytes(194), COMMAND))
    with guarded_site.open_client() as client:
        assert [each.name for each in client.models()] == ["m"]


def test_logs_and_errors_hold_names_of_keys_and_no_key(guarded_site: Site, keys: Keys) -> None:
    eventually(lambda: bool(guarded_site.controller.output), PATIENCE_S, "something was logged")
    text = "".join(guarded_site.controller.output)
    for path in (*keys.pairs.glob("*.key_secret"), *keys.folder.glob("*.key_secret")):
        pair = read_pair(path)
        assert pair.secret.decode() not in text
        assert pair.public.decode() not in text


# --- routing ids


@pytest.mark.parametrize("identity", [b"me", b"12345", b"x" * 255])
def test_a_routing_id_that_could_be_guessed_is_not_served(guarded_site: Site, keys: Keys, identity: bytes) -> None:
    """Who connected under it once its owner had gone would get what is still sent there."""
    with Curved(guarded_site, "clients", keys.client, identity=identity) as peer:
        error = peer.answer(m.ListModels(7))
        assert (error.rid, error.code) == (7, InvalidParameter.code)
        assert "ZMQ_ROUTING_ID" in error.message
    with Curved(guarded_site, "workers", keys.worker, identity=identity) as peer:
        refused = peer.refusal(offer("w2"))
        assert refused.code == InvalidParameter.code
