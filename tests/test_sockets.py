"""Endpoints and binding: what is taken, what is refused, and that nobody else is disturbed by it."""

from __future__ import annotations

import os
import select
import socket as plain
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from zmqserve.errors import BindFailed, InvalidEndpoint
from zmqserve.sockets import MAX_IPC_PATH, Binding, Monitor, SocketLimits, check_endpoint, connect, dealer, raise_descriptor_limit, router


class Sockets:
    """Makes sockets, and closes them after the test."""

    def __init__(self) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.made: list[zmq.Socket[bytes]] = []

    def router(self) -> zmq.Socket[bytes]:
        self.made.append(router(self.context, SocketLimits()))
        return self.made[-1]

    def dealer(self, endpoint: str) -> zmq.Socket[bytes]:
        self.made.append(dealer(self.context, SocketLimits(), immediate=False))
        connect(self.made[-1], endpoint)
        return self.made[-1]


@pytest.fixture
def sockets() -> Iterator[Sockets]:
    made = Sockets()
    yield made
    for socket in made.made:
        socket.close(linger=0)
    made.context.term()


FIRST_PEER = """
import zmq
from zmqserve.sockets import SocketLimits, router
context = zmq.Context()
socket, peer = router(context, SocketLimits()), context.socket(zmq.DEALER)
peer.connect(f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}")
peer.send(b"")
print(socket.recv().hex())
"""


def test_routing_ids_are_others_in_each_process() -> None:
    """Who could foretell them could take one before its owner, which ends libzmq's process."""
    first, second = (subprocess.run([sys.executable, "-c", FIRST_PEER], capture_output=True, text=True, check=True) for _ in range(2))
    assert first.stdout.startswith("00")
    assert first.stdout != second.stdout


@pytest.mark.parametrize(
    ("endpoint", "taken"),
    [
        ("tcp://127.0.0.1:5570", "tcp://127.0.0.1:5570"),
        ("tcp://127.0.0.1:0", "tcp://127.0.0.1:*"),
        ("tcp://*:*", "tcp://*:*"),
        ("tcp://[::1]:80", "tcp://[::1]:80"),
        ("tcp://host.example:65535", "tcp://host.example:65535"),
        ("ipc:///run/z.ipc", "ipc:///run/z.ipc"),
        ("ipc://relative path.ipc", "ipc://relative path.ipc"),
        ("inproc://a", "inproc://a"),
    ],
)
def test_an_endpoint_is_taken(endpoint: str, taken: str) -> None:
    assert check_endpoint(endpoint, bind=True) == taken


@pytest.mark.parametrize(
    ("endpoint", "bind", "said"),
    [
        ("", True, "expected tcp://HOST:PORT"),
        ("localhost:80", True, "expected tcp://HOST:PORT"),
        ("tcp://127.0.0.1", True, "expected tcp://HOST:PORT"),
        ("tcp://:80", True, "expected tcp://HOST:PORT"),
        ("tcp://::1:80", True, "expected tcp://HOST:PORT"),
        ("tcp://h:-1", True, "expected tcp://HOST:PORT"),
        ("tcp://h:80/path", True, "expected tcp://HOST:PORT"),
        ("udp://h:80", True, "expected tcp://HOST:PORT"),
        ("tcp://h:65536", True, "over 65535"),
        ("tcp://h:0", False, "1 to 65535"),
        ("tcp://h:*", False, "1 to 65535"),
        ("ipc://", True, "needs a path"),
        ("ipc://" + "x" * (MAX_IPC_PATH + 1), True, "108 bytes"),
        ("ipc://" + "é" * 54, True, "108 bytes"),
        ("ipc://@abstract", True, "abstract and wildcard"),
        ("ipc://*", True, "abstract and wildcard"),
        ("ipc://a\0b", True, "cannot be printed"),
        ("tcp://h\n:1", True, "cannot be printed"),
        ("inproc://", True, "needs a name"),
    ],
)
def test_an_endpoint_is_refused_with_the_reason(endpoint: str, bind: bool, said: str) -> None:
    with pytest.raises(InvalidEndpoint) as caught:
        check_endpoint(endpoint, bind=bind)
    assert said in caught.value.message
    assert caught.value.data["endpoint"] == endpoint


def test_a_chosen_port_is_filled_in(sockets: Sockets) -> None:
    bound = Binding(sockets.router(), "tcp://127.0.0.1:0")
    assert int(bound.endpoint.rpartition(":")[2]) > 0
    assert bound.endpoint.startswith("tcp://127.0.0.1:")


def test_a_port_in_use_is_named_and_its_owner_goes_on(sockets: Sockets) -> None:
    with plain.create_server(("127.0.0.1", 0)) as owner:
        endpoint = f"tcp://127.0.0.1:{owner.getsockname()[1]}"
        with pytest.raises(BindFailed, match="in use") as caught:
            Binding(sockets.router(), endpoint)
        assert caught.value.data["endpoint"] == endpoint
        with plain.create_connection(owner.getsockname(), timeout=5):
            pass


def test_an_ipc_path_in_use_is_named_and_its_owner_goes_on(sockets: Sockets, tmp_path: Path) -> None:
    endpoint = f"ipc://{tmp_path}/z.ipc"
    owner = sockets.router()
    binding = Binding(owner, endpoint)
    with pytest.raises(BindFailed, match="another process has it bound"):
        Binding(sockets.router(), endpoint)
    client = sockets.dealer(endpoint)
    client.send(b"still here?")
    assert owner.poll(5000)
    assert owner.recv_multipart()[1] == b"still here?"
    owner.close(linger=0)
    binding.release()
    binding.release()
    Binding(sockets.router(), endpoint).release()


def test_an_ipc_socket_is_its_users_alone(sockets: Sockets, tmp_path: Path) -> None:
    path = tmp_path / "new" / "z.ipc"
    binding = Binding(sockets.router(), f"ipc://{path}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    binding.release()


def test_a_file_at_an_ipc_path_is_not_overwritten(sockets: Sockets, tmp_path: Path) -> None:
    path = tmp_path / "thesis.txt"
    path.write_text("years of work")
    with pytest.raises(BindFailed, match="not a socket"):
        Binding(sockets.router(), f"ipc://{path}")
    assert path.read_text() == "years of work"


def test_a_dead_owners_socket_file_is_replaced(sockets: Sockets, tmp_path: Path) -> None:
    path = tmp_path / "z.ipc"
    with plain.socket(plain.AF_UNIX) as dead:
        dead.bind(str(path))
    Binding(sockets.router(), f"ipc://{path}").release()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_written_says_so(sockets: Sockets) -> None:
    with pytest.raises(BindFailed, match="Permission denied"):
        Binding(sockets.router(), "ipc:///z.ipc")


def test_a_directory_that_cannot_be_made_says_so(sockets: Sockets, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BindFailed, match=r"Not a directory|File exists"):
        Binding(sockets.router(), f"ipc://{tmp_path}/file/z.ipc")


def test_an_inproc_name_in_use_is_named(sockets: Sockets) -> None:
    Binding(sockets.router(), "inproc://a")
    with pytest.raises(BindFailed, match="inproc://a"):
        Binding(sockets.router(), "inproc://a")


def test_no_socket_has_an_identity_or_lingers(sockets: Sockets) -> None:
    for socket in (sockets.router(), sockets.dealer("inproc://nobody")):
        assert socket.getsockopt(zmq.IDENTITY) == b""
        assert socket.getsockopt(zmq.LINGER) == 0
        assert socket.getsockopt(zmq.MAXMSGSIZE) == SocketLimits().message_bytes


def test_the_descriptor_limit_is_the_highest_allowed() -> None:
    assert raise_descriptor_limit() == raise_descriptor_limit() > 0


def test_a_monitor_tells_that_a_connection_broke() -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    server = router(context, SocketLimits())
    bound = Binding(server, "tcp://127.0.0.1:*")
    client = dealer(context, SocketLimits(), immediate=True)
    connect(client, bound.endpoint)
    monitor = Monitor(client)
    try:
        assert client.poll(5000, zmq.POLLOUT)
        poller = select.poll()
        poller.register(monitor.fd, select.POLLIN)
        server.close(linger=0)
        broken = 0
        while not broken and poller.poll(5000):
            broken = monitor.take()
        assert broken == 1
        assert monitor.take() == 0
    finally:
        monitor.close()
        client.close(linger=0)
        server.close(linger=0)
        context.term()
