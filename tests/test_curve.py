"""CURVE over real sockets: who gets in at which door, what the others are told, and keys that come and go under way."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from socket import create_connection
from typing import Any

import msgspec
import pytest
import zmq

from zmqserve import AsyncClient, Client, Controller, PolledClient, SamplingParams, WorkerConfig
from zmqserve import messages as m
from zmqserve.backends.echo import EchoWorker
from zmqserve.certificate import read_pair, read_public
from zmqserve.credentials import Credentials
from zmqserve.curve import CLIENTS_DOMAIN, ZAP_ENDPOINT, Curve, FailedHandshakes, guard, identify
from zmqserve.errors import BindFailed, ControllerUnreachable, InvalidParameter, Refused, Unauthenticated
from zmqserve.keyring import Keyring
from zmqserve.sockets import Binding, Monitor, SocketLimits, connect, dealer, router
from zmqserve.zap import BURST_S, ZapHandler

from .keyrings import Keys, usual
from .processes import PATIENCE_S, eventually

ANY = "tcp://127.0.0.1:*"
TWO = ("tcp://127.0.0.1:1", "tcp://127.0.0.1:2")
PATIENCE_MS = int(PATIENCE_S * 1000)
SOON_S = 30.0
"""What is said at once may take so long on a busy machine; far less than any deadline that would say it otherwise. There libzmq often
ends a connection without keys before the other end has read that it wants CURVE, and that end then tries ten times a second.
"""
WORDS = "one two three"


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return usual(tmp_path)


class Said:
    """What a controller logs."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def __call__(self, event: str, **fields: Any) -> None:
        self.lines.append({"event": event, **fields})

    def of(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["event"] == event]


@contextmanager
def served(keys: Keys, *, worker: str | None = "gpu", said: Said | None = None, **settings: Any) -> Iterator[Controller]:
    """A controller with these keys, and an echo worker with its key `worker`."""
    options: dict[str, Any] = {"clients": [ANY], "workers": [ANY], "curve_dir": str(keys), "report": said or Said(), **settings}
    with ExitStack() as stack:
        controller = stack.enter_context(Controller(**options))
        if worker is not None:
            stack.enter_context(echo(keys, worker, controller))
        yield controller


@contextmanager
def echo(
    keys: Keys, key: str, *controllers: Controller, wait: bool = True, delay_per_token_s: float = 0.0, **settings: Any
) -> Iterator[EchoWorker]:
    """An echo worker of these controllers."""
    endpoints = tuple(controller.worker_endpoints[0] for controller in controllers)
    config = WorkerConfig(**{"model": "m", "controllers": endpoints, **keys.as_worker(key), **settings})
    with EchoWorker(config, delay_per_token_s=delay_per_token_s) as worker:
        if wait:
            worker.wait_ready(PATIENCE_S)
        yield worker


def answer(controller: Controller, **options: Any) -> str:
    with Client(controller.client_endpoints[0], **options) as client:
        return client.generate("m", WORDS, max_tokens=3, stream=False).text


# --- who gets in ---------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["tcp", "ipc"])
@pytest.mark.parametrize("name", ["alice", "boss"])
def test_clients_and_admins_are_let_in(keys: Keys, tmp_path: Path, transport: str, name: str) -> None:
    ends: dict[str, Any] = {} if transport == "tcp" else {"clients": [f"ipc://{tmp_path}/c"], "workers": [f"ipc://{tmp_path}/w"]}
    with served(keys, **ends) as controller:
        assert answer(controller, **keys.as_client(name)) == WORDS


OUTSIDE: dict[str, tuple[Callable[[Keys], dict[str, Any]], str]] = {
    "a key that nobody allowed": (lambda keys: keys.as_client("mallory"), "it does not know this key for clients"),
    "a worker's key": (lambda keys: keys.as_client("gpu"), "it does not know this key for clients"),
    "no key": (lambda _keys: {}, "it wants CURVE"),
    "the key of another controller": (
        lambda keys: {**keys.as_client("alice"), "controller_key": keys.workers_port},
        "controller_key must be",
    ),
}


@pytest.mark.parametrize("why", OUTSIDE)
@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_a_client_that_is_not_let_in_is_told_why_at_once(keys: Keys, tmp_path: Path, why: str, transport: str) -> None:
    ends: dict[str, Any] = {} if transport == "tcp" else {"clients": [f"ipc://{tmp_path}/c"]}
    options, what = OUTSIDE[why]
    with served(keys, worker=None, **ends) as controller:
        began_s = time.monotonic()
        with Client(controller.client_endpoints[0], connect_timeout_s=60, **options(keys)) as client:
            for _ in range(2):  # and told so again
                with pytest.raises(Unauthenticated, match=what) as caught:
                    client.models()
                assert controller.client_endpoints[0] in caught.value.message
                assert (caught.value.code, caught.value.retryable) == (40102, False)
        assert time.monotonic() - began_s < SOON_S


def test_a_key_for_a_controller_without_curve_is_told_so(keys: Keys) -> None:
    with (
        Controller(clients=[ANY], workers=[ANY], report=Said()) as controller,
        pytest.raises(Unauthenticated, match="speaks without CURVE"),
    ):
        answer(controller, connect_timeout_s=60, **keys.as_client("alice"))


def test_a_port_where_nobody_listens_is_no_question_of_keys(keys: Keys) -> None:
    with Client("tcp://127.0.0.1:1", **keys.as_client("alice")) as client, pytest.raises(ControllerUnreachable):
        client.models()


def test_the_other_clients_are_told_as_well(keys: Keys) -> None:
    with served(keys) as controller:
        endpoint = controller.client_endpoints[0]

        async def asked(options: dict[str, Any]) -> str:
            async with AsyncClient(endpoint, **options) as client:
                return (await client.generate("m", WORDS, max_tokens=3, stream=False)).text

        assert asyncio.run(asked(keys.as_client("alice"))) == WORDS
        with pytest.raises(Unauthenticated):
            asyncio.run(asked(keys.as_client("mallory")))
        for name in ("alice", "mallory"):
            with PolledClient(endpoint, **keys.as_client(name)) as polled:
                pending = polled.generate("m", WORDS, max_tokens=3, stream=False)
                poller = zmq.Poller()
                poller.register(polled.fileno(), zmq.POLLIN)
                while not pending.done:
                    poller.poll(polled.wait_ms())
                    polled.process()
                if name == "alice":
                    assert pending.result().text == WORDS
                else:
                    with pytest.raises(Unauthenticated):
                        pending.result()


def test_map_ends_at_once_for_who_is_not_let_in(keys: Keys) -> None:
    with served(keys, worker=None) as controller, Client(controller.client_endpoints[0], **keys.as_client("mallory")) as client:
        began_s = time.monotonic()
        with pytest.raises(Unauthenticated):
            list(client.map("m", ["a"] * 1000))
        assert time.monotonic() - began_s < SOON_S


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (lambda keys: keys.as_worker("mallory"), "it does not know this key for workers"),
        (lambda keys: keys.as_worker("alice"), "it does not know this key for workers"),
        (lambda keys: keys.as_worker("boss"), "it does not know this key for workers"),
        (lambda _keys: {}, "it wants CURVE"),
        (lambda keys: {**keys.as_worker("gpu"), "controller_key": keys.clients_port}, "controller_key must be the workers-port.key"),
    ],
)
def test_a_worker_that_is_not_let_in_says_why(keys: Keys, options: Callable[[Keys], dict[str, Any]], why: str) -> None:
    with served(keys, worker=None) as controller:
        config = WorkerConfig(model="m", controllers=tuple(controller.worker_endpoints), **options(keys))
        with EchoWorker(config) as worker:

            def told() -> bool:
                links = worker._links
                return links is not None and any(link.refusal is not None and why in link.refusal.why for link in links.workload.links)

            eventually(told, PATIENCE_S, "the worker knows why")
            with pytest.raises(TimeoutError, match=rf"took it within 0.2 s; .*{why}"):
                worker.wait_ready(0.2)
        with Client(controller.client_endpoints[0], **keys.as_client("boss")) as client:
            assert client.status().workers == []


def test_inproc_needs_no_key(keys: Keys) -> None:
    """libzmq asks nobody there: whoever is in the process could do anything anyway."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    ends: dict[str, Any] = {"clients": [ANY, "inproc://c"], "workers": [ANY, "inproc://w"]}
    with served(keys, worker=None, context=context, **ends):
        with EchoWorker(WorkerConfig(model="m", controllers=("inproc://w",), context=context)) as worker:
            worker.wait_ready(PATIENCE_S)
            with Client("inproc://c", context=context) as client:
                assert client.generate("m", WORDS, max_tokens=3, stream=False).text == WORDS
                assert [each.name for each in client.status().workers] == [worker.name]
    context.term()


def test_a_plain_zeromq_socket_is_a_client_too(keys: Keys) -> None:
    """PROTOCOL.md: CURVE lies below all messages."""
    with served(keys) as controller:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        socket = context.socket(zmq.REQ)
        identify(socket, Curve(read_pair(Path(keys.secret("alice"))), read_public(Path(keys.clients_port))))
        socket.connect(controller.client_endpoints[0])
        socket.send(m.encode(m.Generate(1, "m", stream=False, prompt=WORDS, params=SamplingParams(max_tokens=3))))
        assert socket.poll(PATIENCE_MS)
        reply = m.decoder(m.Reply).decode(socket.recv())
        assert reply.choices[0].text == WORDS
        socket.close(linger=0)
        context.term()


def test_no_key_is_logged(keys: Keys) -> None:
    said = Said()
    with served(keys, said=said) as controller:
        answer(controller, **keys.as_client("alice"))
        with pytest.raises(Unauthenticated):
            answer(controller, **keys.as_client("mallory"))
        keys.revoke("alice")
        controller.reload()
        eventually(lambda: bool(said.of("keys changed")), PATIENCE_S, "the change is told")
        with Client(controller.client_endpoints[0], **keys.as_client("boss")) as client:
            status = repr(client.status())
            assert client.status().counters["refused handshakes: key not allowed"] >= 1
    assert said.of("key not allowed")[0]["domain"] == "clients"
    assert said.of("keys changed")[0]["revoked"] == ["alice"]
    files = [*keys.own.iterdir(), *keys.folder.glob("*.key")]
    texts = [text for path in files if path.suffix == ".key" for text in [read_public(path)]]
    texts += [read_pair(path).secret.decode() for path in files if path.suffix == ".key_secret"]
    assert not [text for text in texts if text in repr(said.lines) + status]


# --- keys that come and go -----------------------------------------------------------------------


def test_a_key_that_is_allowed_later_gets_in_without_a_restart(keys: Keys) -> None:
    with (
        served(keys) as controller,
        Client(controller.client_endpoints[0], **keys.as_client("mallory")) as client,
        echo(keys, keys_new(keys, "gpu2"), controller, wait=False, name="late") as worker,
    ):
        with pytest.raises(Unauthenticated):
            client.models()
        keys.allow("mallory", "client")
        keys.allow("gpu2", "worker")
        eventually(lambda: lets_in(client), PATIENCE_S, "the client is let in")
        worker.wait_ready(PATIENCE_S)


def keys_new(keys: Keys, name: str) -> str:
    keys.new(name)
    return name


def lets_in(client: Client) -> bool:
    try:
        client.models()
    except Unauthenticated:
        return False
    return True


def test_a_revoked_clients_streams_end_and_others_go_on(keys: Keys) -> None:
    keys.new("bob", "client")
    with (
        served(keys) as controller,
        Client(controller.client_endpoints[0], **keys.as_client("alice")) as alice,
        Client(controller.client_endpoints[0], **keys.as_client("bob")) as bob,
    ):
        streams = [client.generate("m", WORDS, max_tokens=100_000_000) for client in (alice, bob)]
        for stream in streams:
            next(iter(stream))
        began_s = time.monotonic()
        keys.revoke("alice")
        with pytest.raises(Unauthenticated):
            for _ in streams[0]:
                pass
        assert time.monotonic() - began_s < SOON_S
        with pytest.raises(Unauthenticated):
            alice.models()
        assert [next(iter(streams[1])).seq for _ in range(1000)] == list(range(1, 1001))
        streams[1].close()
        eventually(lambda: bob.status().running == 0, PATIENCE_S, "no slot is left behind")


def test_a_connection_that_stays_open_is_no_way_in(keys: Keys) -> None:
    """ZAP acts on handshakes only: messages on a connection from before are answered 40102 and dropped."""
    with served(keys) as controller:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        socket = context.socket(zmq.DEALER)
        identify(socket, Curve(read_pair(Path(keys.secret("alice"))), read_public(Path(keys.clients_port))))
        socket.connect(controller.client_endpoints[0])

        def asked(request: msgspec.Struct) -> Any:
            socket.send(m.encode(request))
            assert socket.poll(PATIENCE_MS)
            return m.decoder(m.ToClient).decode(socket.recv())

        assert isinstance(asked(m.ListModels(1)), m.Models)
        keys.revoke("alice")
        controller.reload()
        eventually(lambda: isinstance(asked(m.ListModels(2)), m.Error), PATIENCE_S, "it is revoked")
        for request in (m.ListModels(3), m.Status(3), m.Generate(3, "m", prompt="x"), m.Embed(3, "m", texts=["x"]), m.Drain(3, "w")):
            error = asked(request)
            assert isinstance(error, m.Error)
            assert (error.rid, error.code) == (3, 40102)
        socket.close(linger=0)
        context.term()


def test_a_revoked_workers_requests_move_and_it_ends(keys: Keys) -> None:
    keys.new("gpu2", "worker")
    with served(keys, worker=None) as controller, Client(controller.client_endpoints[0], **keys.as_client("alice")) as client:
        with echo(keys, "gpu", controller, name="w1", delay_per_token_s=0.005) as first:
            stream = client.generate("m", WORDS, max_tokens=300)
            words = [next(iter(stream)).text]
            with echo(keys, "gpu2", controller, name="w2"):
                keys.revoke("gpu")
                words += [chunk.text for chunk in stream]
                assert "".join(words).split() == (WORDS.split() * 100)[:300]
                assert stream.completion.resumed == 1
                assert stream.completion.timings.worker == "w2"
                with pytest.raises(Refused, match="key"):
                    first.wait_ended(PATIENCE_S)


def test_a_broken_file_on_the_way_changes_nothing_else(keys: Keys) -> None:
    said = Said()
    with served(keys, said=said) as controller:
        (keys.folder / "clients" / "broken.key").write_text("")
        (keys.folder / "access.toml").write_text("nonsense = ")
        eventually(lambda: len(said.of("key not usable")) > 0, PATIENCE_S, "it is told")
        eventually(lambda: len(said.of("rules not usable, the old ones stay in force")) > 0, PATIENCE_S, "that, too")
        assert answer(controller, **keys.as_client("alice")) == WORDS
    assert len(said.of("key not usable")) == 1


# --- several controllers -------------------------------------------------------------------------


def test_failover_goes_past_a_controller_that_refuses_the_key(keys: Keys, tmp_path: Path) -> None:
    other = Keys(tmp_path / "other")
    with served(other, worker=None) as first, served(keys) as second:
        endpoints = [first.client_endpoints[0], second.client_endpoints[0]]
        ports = [other.clients_port, keys.clients_port]
        began_s = time.monotonic()
        with Client(endpoints, key=keys.secret("alice"), controller_key=ports, connect_timeout_s=60) as client:
            assert client.generate("m", WORDS, max_tokens=3, stream=False).text == WORDS
        with Client(endpoints, key=keys.secret("mallory"), controller_key=ports, connect_timeout_s=60) as client:
            with pytest.raises(Unauthenticated):
                client.models()
        assert time.monotonic() - began_s < SOON_S


def test_a_key_revoked_at_one_controller_moves_what_runs_to_the_other(keys: Keys, tmp_path: Path) -> None:
    other = Keys(tmp_path / "other")
    other.new("gpu", "worker")
    (other.own / "alice.key").write_text((keys.own / "alice.key").read_text())
    other.allow("alice", "client")
    with served(keys, worker=None) as first, served(other) as second, echo(keys, "gpu", first, delay_per_token_s=0.005):
        endpoints = [first.client_endpoints[0], second.client_endpoints[0]]
        with Client(endpoints, key=keys.secret("alice"), controller_key=[keys.clients_port, other.clients_port]) as client:
            stream = client.generate("m", WORDS, max_tokens=300)
            words = [next(iter(stream)).text]
            keys.revoke("alice")
            words += [chunk.text for chunk in stream]
            assert "".join(words).split() == (WORDS.split() * 100)[:300]
            assert stream.completion.resumed == 1


def test_a_worker_serves_controllers_with_different_keys(keys: Keys, tmp_path: Path) -> None:
    other = Keys(tmp_path / "other")
    (other.own / "gpu.key").write_text((keys.own / "gpu.key").read_text())
    other.allow("gpu", "worker")
    other.new("carol", "client")
    with served(keys, worker=None) as first, served(other, worker=None) as second:
        with echo(keys, "gpu", first, second, controller_key=[keys.workers_port, other.workers_port]):
            eventually(lambda: answer_or_none(first, keys.as_client("alice")) == WORDS, PATIENCE_S, "the first serves")
            eventually(lambda: answer_or_none(second, other.as_client("carol")) == WORDS, PATIENCE_S, "the second serves")


def answer_or_none(controller: Controller, options: dict[str, Any]) -> str | None:
    try:
        return answer(controller, **options)
    except Exception as error:
        if isinstance(error, Unauthenticated):
            raise
        return None


def below_of(parent: Controller, keys: Keys, name: str) -> dict[str, Any]:
    """Settings of a controller that is a worker of `parent`, with the key `name`."""
    return {"parents": list(parent.worker_endpoints), "parent_key": keys.secret(name), "parent_controller_key": keys.workers_port}


def test_a_controller_is_its_parents_worker_with_a_key(keys: Keys, tmp_path: Path) -> None:
    below = Keys(tmp_path / "below")
    below.new("gpu", "worker")
    keys.new("site", "worker")
    with served(keys, worker=None) as parent:
        link: dict[str, Any] = {
            "parents": list(parent.worker_endpoints),
            "parent_key": keys.secret("site"),
            "parent_controller_key": keys.workers_port,
        }
        with served(below, **link):
            eventually(lambda: answer_or_none(parent, keys.as_client("alice")) == WORDS, PATIENCE_S, "the parent serves it")
            keys.revoke("site")
            parent.reload()

            def gone() -> bool:
                with Client(parent.client_endpoints[0], **keys.as_client("boss")) as client:
                    return client.status().workers == []

            eventually(gone, PATIENCE_S, "the parent has let go of it")


def test_a_parent_that_refuses_the_key_is_told(keys: Keys, tmp_path: Path) -> None:
    said = Said()
    below = Keys(tmp_path / "below")
    with served(keys, worker=None) as parent:
        link: dict[str, Any] = {
            "parents": list(parent.worker_endpoints),
            "parent_key": keys.secret("mallory"),
            "parent_controller_key": keys.workers_port,
        }
        with served(below, worker=None, said=said, **link):
            eventually(lambda: bool(said.of("parent refused for now")), PATIENCE_S, "it is told")
    assert "it does not know this key for workers" in said.of("parent refused for now")[0]["why"]


@pytest.mark.heavy
@pytest.mark.timeout(180)
def test_all_keys_can_be_replaced_and_no_request_is_lost(keys: Keys, tmp_path: Path) -> None:
    """Two controllers; the client's key is replaced, the worker's, then each controller's, while requests go on all the time."""
    both = (keys, Keys(tmp_path / "second"))
    for name, role in (("alice", "client"), ("gpu", "worker")):
        (both[1].own / f"{name}.key").write_text((keys.own / f"{name}.key").read_text())
        both[1].allow(name, role)
    ended = threading.Event()
    answers: list[str] = []
    failures: list[BaseException] = []
    with ExitStack() as stack:
        controllers = [Controller(clients=[ANY], workers=[ANY], curve_dir=str(each), report=Said()) for each in both]
        for controller in controllers:
            controller.start()

        def stop() -> None:
            for controller in controllers:
                controller.stop()

        stack.callback(stop)
        places = [(controller.client_endpoints[0], controller.worker_endpoints[0]) for controller in controllers]
        workers = {"controllers": tuple(place[1] for place in places), "controller_key": [each.workers_port for each in both]}
        for name in ("w1", "w2"):
            config = WorkerConfig(model="m", name=name, key=keys.secret("gpu"), **workers)  # type: ignore[arg-type]
            stack.enter_context(EchoWorker(config)).wait_ready(PATIENCE_S)

        def ask() -> None:
            options: dict[str, Any] = {"key": keys.secret("alice"), "controller_key": [each.clients_port for each in both]}
            with Client([place[0] for place in places], **options) as client:
                while not ended.is_set():
                    try:
                        answers.append(client.generate("m", WORDS, max_tokens=60, stream=False).text)
                    except BaseException as error:  # noqa: BLE001 - told below
                        failures.append(error)
                        return

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()

        def go_on() -> None:
            count = len(answers)
            eventually(lambda: len(answers) > count + 20 or bool(failures), PATIENCE_S, "requests go on")

        def counted(controller: Controller, each: Keys) -> int:
            with Client(controller.client_endpoints[0], **each.as_client("watch")) as client:
                return sum(worker.state == "ready" for worker in client.status().workers)

        try:
            for each in both:
                each.new("watch", "admin")
            go_on()
            # The client's: allow the new one at both, put it into the file, revoke the old one.
            for name, role in (("alice", "client"), ("gpu", "worker")):
                keys.new(f"{name}-2")
                (both[1].own / f"{name}-2.key").write_text((keys.own / f"{name}-2.key").read_text())
                for each in both:
                    each.allow(f"{name}-2", role)
                for controller in controllers:
                    controller.reload()
                go_on()
                keys.replace(name, f"{name}-2")
                if role == "client":
                    for each in both:
                        each.revoke(name)
                go_on()
            # Each controller's: stop it, new keys, start it again where it was; its peers have its new public key at the same path.
            for number, each in enumerate(both):
                controllers[number].stop()
                each.renew_ports()
                clients, there = places[number]
                controllers[number] = Controller(clients=[clients], workers=[there], curve_dir=str(each), report=Said())
                controllers[number].start()
                eventually(lambda n=number, k=each: counted(controllers[n], k) == 2, PATIENCE_S, "both workers are back")  # type: ignore[misc]
                go_on()
            for each in both:
                each.revoke("gpu")  # nobody has it any more: the workers came back with the new one
            go_on()
            assert [counted(controller, each) for controller, each in zip(controllers, both, strict=True)] == [2, 2]
        finally:
            ended.set()
            for thread in threads:
                thread.join()
    assert not failures, failures
    assert Counter(answers) == {" ".join(WORDS.split() * 20): len(answers)}


# --- programs around it --------------------------------------------------------------------------


def test_a_context_with_a_zap_handler_is_refused_clearly(keys: Keys) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    theirs = context.socket(zmq.REP)
    theirs.bind(ZAP_ENDPOINT)
    with pytest.raises(BindFailed, match=r"this zmq\.Context has a ZAP handler already.*a Context of its own") as caught:
        Controller(clients=[ANY], workers=[ANY], curve_dir=str(keys), context=context).bind()
    assert caught.value.data["endpoint"] == ZAP_ENDPOINT
    with Controller(clients=[ANY], workers=[ANY], context=context, report=Said()):
        pass  # without keys it does not matter
    theirs.unbind(ZAP_ENDPOINT)
    theirs.close(linger=0)
    for _ in range(3):  # it lets go of the handler's name when it stops
        with served(keys, context=context) as controller:
            assert answer(controller, **keys.as_client("alice")) == WORDS
            with pytest.raises(BindFailed, match="another controller with curve_dir"):
                Controller(clients=[ANY], workers=[ANY], curve_dir=str(keys), context=context).bind()
    context.term()


def test_a_context_that_is_ended_ends_the_controller(keys: Keys) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    said = Said()
    controller = Controller(clients=[ANY], workers=[ANY], curve_dir=str(keys), context=context, report=said)
    controller.start()
    context.term()
    controller.stop()
    assert said.of("context terminated")


def test_wrong_keys_are_named_before_anything_is_opened(keys: Keys, tmp_path: Path) -> None:
    loose = Path(keys.new("loose"))
    loose.chmod(0o644)
    for options, parameter, what in (
        ({"key": keys.secret("alice")}, "controller_key", "key is given without controller_key"),
        ({"controller_key": keys.clients_port}, "key", "controller_key is given without key"),
        ({"key": str(loose), "controller_key": keys.clients_port}, "key", f"chmod 600 {loose}"),
        ({"key": keys.clients_port, "controller_key": keys.clients_port}, "key", "holds a public key only"),
        ({"key": keys.secret("alice"), "controller_key": keys.secret("boss")}, "controller_key", "holds a secret key"),
        ({"key": str(tmp_path / "none"), "controller_key": keys.clients_port}, "key", "No such file"),
        (
            {"key": keys.secret("alice"), "controller_key": [keys.clients_port] * 3},
            "controller_key",
            "one file for all endpoints",
        ),
        ({"key": 7, "controller_key": keys.clients_port}, "key", "must be the path of a file"),
        ({"key": "", "controller_key": keys.clients_port}, "key", "must be the path of a file"),
        ({"key": keys.secret("alice"), "controller_key": []}, "controller_key", "must be the path of a file"),
    ):
        settings: dict[str, Any] = dict(options)
        for make in (
            lambda settings=settings: Client(["tcp://127.0.0.1:1", "tcp://127.0.0.1:2"], **settings),
            lambda settings=settings: EchoWorker(
                WorkerConfig(model="m", controllers=("tcp://127.0.0.1:1", "tcp://127.0.0.1:2"), **settings)
            ).start(),
        ):
            with pytest.raises(InvalidParameter, match=what) as caught:
                make()
            assert caught.value.parameter == parameter
    with pytest.raises(InvalidParameter, match="parent_key is given without parent_controller_key") as caught:
        Controller(clients=[ANY], workers=[ANY], parents=["tcp://127.0.0.1:1"], parent_key=keys.secret("gpu")).bind()
    assert caught.value.parameter == "parent_controller_key"


def test_a_forked_client_proves_itself_anew(keys: Keys) -> None:
    with served(keys) as controller, Client(controller.client_endpoints[0], **keys.as_client("alice")) as client:
        assert client.generate("m", WORDS, max_tokens=3, stream=False).text == WORDS
        here, there = multiprocessing.Pipe()

        def child() -> None:
            there.send(client.generate("m", WORDS, max_tokens=2, stream=False).text)

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        try:
            assert here.poll(PATIENCE_S)
            assert here.recv() == "one two"
        finally:
            process.kill()
            process.join()
        assert client.generate("m", WORDS, max_tokens=3, stream=False).text == WORDS


def test_keys_by_environment(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(keys, worker=None) as controller:
        monkeypatch.setenv("ZMQSERVE_KEY", keys.secret("gpu"))
        monkeypatch.setenv("ZMQSERVE_CONTROLLER_KEY", keys.workers_port)
        with EchoWorker(WorkerConfig(model="m", controllers=tuple(controller.worker_endpoints))) as worker:
            worker.wait_ready(PATIENCE_S)
            monkeypatch.setenv("ZMQSERVE_KEY", keys.secret("alice"))
            monkeypatch.setenv("ZMQSERVE_CONTROLLER_KEY", f"{keys.clients_port}, {keys.clients_port}")
            with Client([controller.client_endpoints[0], "tcp://127.0.0.1:1"]) as client:
                assert client.generate("m", WORDS, max_tokens=3, stream=False).text == WORDS
            monkeypatch.setenv("ZMQSERVE_KEY", keys.secret("mallory"))
            assert answer(controller, **keys.as_client("alice")) == WORDS  # what is given beats it


# --- the handler itself --------------------------------------------------------------------------


@contextmanager
def guarded(keys: Keys) -> Iterator[tuple[zmq.Context[zmq.Socket[bytes]], zmq.Socket[bytes], str]]:
    """A controller's socket for clients in a context without a ZAP handler."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    door = router(context, SocketLimits())
    guard(door, Keyring(keys.folder).ports[0], CLIENTS_DOMAIN)
    try:
        yield context, door, Binding(door, ANY).endpoint
    finally:
        context.destroy(linger=0)


def test_without_a_handler_nobody_gets_in(keys: Keys) -> None:
    """libzmq would let in whoever knows the public key, were it not told otherwise."""
    with guarded(keys) as (context, door, endpoint):
        counters: Counter[str] = Counter()
        monitor = Monitor(door, FailedHandshakes(counters).tell)
        curve = Credentials(keys.secret("alice"), keys.clients_port, [endpoint]).curve(endpoint)
        client = dealer(context, SocketLimits(), immediate=False, curve=curve)
        connect(client, endpoint)
        client.send(b"hello?")
        eventually(lambda: bool(monitor.take() >= 0 and counters), PATIENCE_S, "a handshake has failed")
        assert not door.poll(100)
        monitor.close()


def test_handshakes_that_fail_are_counted_by_reason(keys: Keys) -> None:
    with guarded(keys) as (context, door, endpoint):
        counters: Counter[str] = Counter()
        monitor = Monitor(door, FailedHandshakes(counters).tell)
        host, port = endpoint.removeprefix("tcp://").split(":")
        other = Credentials(keys.secret("alice"), keys.workers_port, [endpoint]).curve(endpoint)
        strangers = [dealer(context, SocketLimits(), immediate=False, curve=curve) for curve in (None, other)]
        for stranger in strangers:
            connect(stranger, endpoint)
        with create_connection((host, int(port))):
            names = {f"refused handshakes: {why}" for why in ("without CURVE", "not for this port", "not finished")}
            eventually(lambda: bool(monitor.take() >= 0) and set(counters) == names, PATIENCE_S, "all are counted")
        monitor.close()


class Asked:
    """A ZapHandler, asked as libzmq asks it."""

    def __init__(self, keys: Keys, *, handshakes_per_s: float = 1e6) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.counters: Counter[str] = Counter()
        self.said = Said()
        self.handler = ZapHandler(self.context, Keyring(keys.folder), self.counters, self.said, handshakes_per_s=handshakes_per_s)
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.connect(ZAP_ENDPOINT)

    def send(self, *frames: bytes) -> None:
        self.socket.send_multipart([b"", *frames])

    def about(self, keys: Keys, name: str, domain: bytes, now: float = 0.0) -> list[bytes] | None:
        """The answer to who has this key; None without one."""
        public = read_public(keys.own / f"{name}.key")
        self.send(b"1.0", b"77", domain, b"127.0.0.1", b"", b"CURVE", zmq.utils.z85.decode(public.encode()))
        return self.heard(now)

    def heard(self, now: float = 0.0) -> list[bytes] | None:
        assert self.handler.socket.poll(PATIENCE_MS)
        self.handler.serve(now, 10)
        return self.socket.recv_multipart() if self.socket.poll(0) else None

    def close(self) -> None:
        self.socket.close(linger=0)
        self.handler.close()
        self.context.term()


@contextmanager
def asked(keys: Keys, **options: float) -> Iterator[Asked]:
    made = Asked(keys, **options)
    try:
        yield made
    finally:
        made.close()


@pytest.mark.parametrize(
    ("name", "domain", "status"),
    [
        ("alice", b"clients", b"200"),
        ("boss", b"clients", b"200"),
        ("gpu", b"workers", b"200"),
        ("gpu", b"clients", b"400"),
        ("alice", b"workers", b"400"),
        ("boss", b"workers", b"400"),
        ("mallory", b"clients", b"400"),
        ("alice", b"", b"400"),
        ("alice", b"global", b"400"),
        ("alice", b"Clients", b"400"),
        ("alice", b"\xff", b"400"),
    ],
)
def test_the_domain_decides_with_the_key(keys: Keys, name: str, domain: bytes, status: bytes) -> None:
    with asked(keys) as handler:
        answer = handler.about(keys, name, domain)
        assert answer is not None
        empty, version, request, got, _text, user, _metadata = answer
        assert (empty, version, request, got) == (b"", b"1.0", b"77", status)
        assert user.decode() == (read_public(keys.own / f"{name}.key") if status == b"200" else "")


@pytest.mark.parametrize(
    "frames",
    [
        (b"1.0", b"1", b"clients", b"127.0.0.1", b"", b"NULL"),
        (b"1.0", b"1", b"clients", b"127.0.0.1", b"", b"PLAIN", b"alice", b"secret"),
        (b"1.0", b"1", b"clients", b"127.0.0.1", b"", b"CURVE"),
        (b"1.0", b"1", b"clients", b"127.0.0.1", b"", b"CURVE", b"short"),
        (b"1.0", b"1", b"clients", b"127.0.0.1", b"", b"CURVE", b"x" * 32, b"x" * 32),
        (b"1.0", b"1", b"clients", b"\xff\xfe", b"\xff", b"\xff", b"\xff"),
    ],
)
def test_other_mechanisms_and_forms_get_nobody_in(keys: Keys, frames: tuple[bytes, ...]) -> None:
    with asked(keys) as handler:
        handler.send(*frames)
        answer = handler.heard()
        assert answer is not None
        assert answer[3] == b"400"


def test_what_is_no_request_is_dropped_and_counted(keys: Keys) -> None:
    with asked(keys) as handler:
        for frames in ((), (b"1.0",), (b"2.0", b"1", b"clients", b"", b"", b"CURVE", b"x" * 32)):
            handler.send(*frames)
            assert handler.heard() is None
        assert handler.counters == {"dropped: not a ZAP request": 3}
        assert (handler.about(keys, "alice", b"clients") or [])[3] == b"200"


def test_refusals_are_counted_and_a_flood_is_one_line_a_second(keys: Keys) -> None:
    with asked(keys) as handler:
        for number in range(300):
            handler.about(keys, "mallory", b"clients", now=10 + number / 100)
        assert handler.counters["refused handshakes: key not allowed"] == 300
        assert [line["count"] for line in handler.said.of("key not allowed")] == [1, 100, 100]


def test_one_key_has_only_so_many_handshakes_a_second(keys: Keys) -> None:
    with asked(keys, handshakes_per_s=5) as handler:
        burst = int(5 * BURST_S)
        got = [handler.about(keys, "alice", b"clients", now=100.0) for _ in range(burst + 3)]
        assert [answer is not None for answer in got] == [True] * burst + [False] * 3
        assert handler.counters["refused handshakes: too many of one key"] == 3
        assert handler.about(keys, "boss", b"clients", now=100.0) is not None  # the others have theirs
        assert handler.about(keys, "alice", b"clients", now=101.0) is not None
