"""Clients and other processes: each child begins anew, and the parent's answers are not disturbed. Real processes, real children."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.processes import PATIENCE_S, ServedController, network

pytestmark = pytest.mark.heavy

PRELUDE = """
import asyncio, os, signal, sys, threading, time
from zmqserve import AsyncClient, Client, PolledClient, errors
endpoint = sys.argv[1]

def fork(child):
    '''Run it in a child, which must end well within some seconds.'''
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(10)
            child()
            code = 0
        except BaseException:
            import traceback
            traceback.print_exc()
            code = 1
        sys.stderr.flush()
        os._exit(code)
    return pid

def joined(pid):
    assert os.waitpid(pid, 0)[1] == 0, "the child failed"

def inherited(read):
    try:
        read()
    except errors.ConnectionFailed as error:
        assert "forked" in str(error) and not error.retryable, error
    else:
        raise AssertionError("an inherited answer was read in a child")

WORDS = " ".join(f"w{number}" for number in range(300))
"""

IDLE = """
client = Client(endpoint)
assert client.generate("m", "a b", stream=False).text == "a b"

def child():
    assert client.generate("m", "c d", stream=False).text == "c d"
    assert [r.text for r in client.map("m", ["x", "y"])] == ["x", "y"]
    joined(fork(grandchild))
    client.close()

def grandchild():
    assert client.generate("m", "e f", stream=False).text == "e f"

pids = [fork(child) for _ in range(3)]
assert client.generate("m", "g h", stream=False).text == "g h"
for pid in pids:
    joined(pid)
assert client.generate("m", "i j", stream=False).text == "i j"
client.close()
"""

BUSY = """
client = Client(endpoint)
texts = []
def read():
    for _ in range(3):
        texts.append(client.generate("m", WORDS, max_tokens=300).text())
readers = [threading.Thread(target=read) for _ in range(8)]
for reader in readers:
    reader.start()
mine = client.generate("m", WORDS, max_tokens=4500)
bulk = client.map("m", [WORDS] * 20, concurrency=4, max_tokens=300)
first = next(bulk)
read_here = [next(mine).text for _ in range(3)]

def child():
    while True:  # what had come before the fork is there still
        try:
            next(mine)
        except errors.ConnectionFailed as error:
            assert "forked" in str(error)
            break
    results = list(bulk)
    assert [r.index for r in results] == list(range(1, 20))
    assert all(r.error is None or "forked" in str(r.error) for r in results), results
    assert any(r.error is None for r in results[5:])
    mine.close()
    assert client.generate("m", "c d", stream=False).text == "c d"

for _ in range(3):
    pid = fork(child)
    read_here.append(next(mine).text)
    joined(pid)
assert "".join(read_here) + "".join(c.text for c in mine) == " ".join([WORDS] * 15)
for reader in readers:
    reader.join()
assert texts == [WORDS] * 24
assert [r.text for r in [first, *bulk]] == [WORDS] * 20
client.close()
"""

LOCKED = """
# Threads open and cancel without end: at some of the forks one of them has the client's lock.
client = Client(endpoint)
ends = False
def churn():
    while not ends:
        client.generate("m", WORDS).close()
threads = [threading.Thread(target=churn) for _ in range(4)]
for thread in threads:
    thread.start()
def child():
    assert client.generate("m", "c d", stream=False).text == "c d"
    client.close()
for _ in range(30):
    joined(fork(child))
ends = True
for thread in threads:
    thread.join()
assert client.generate("m", "g h", stream=False).text == "g h"
client.close()
"""

ON_A_LOOP = """
client = AsyncClient(endpoint)
async def child_main():
    async with client:
        assert (await client.generate("m", "c d", stream=False)).text == "c d"

async def inherited_stream(stream):
    try:
        async for _ in stream:
            pass
    except errors.ConnectionFailed as error:
        assert "forked" in str(error)
    else:
        raise AssertionError

async def main():
    stream = await client.generate("m", WORDS, max_tokens=300)
    first = (await anext(stream)).text
    def child():
        asyncio._set_running_loop(None)
        asyncio.run(inherited_stream(stream))
        asyncio.run(child_main())
    pid = fork(child)
    assert first + "".join([c.text async for c in stream]) == WORDS
    await asyncio.to_thread(joined, pid)
    assert (await client.generate("m", "g h", stream=False)).text == "g h"
    await client.close()
asyncio.run(main())
"""

POLLED = """
import select
client = PolledClient(endpoint)
def answer(pending):
    poller = select.poll()
    poller.register(client, select.POLLIN)
    while not pending.done:
        poller.poll(client.wait_ms())
        client.process()
    return pending.result()
assert answer(client.generate("m", "a b", stream=False)).text == "a b"
mine = client.generate("m", WORDS, stream=False, max_tokens=300)
def child():
    inherited(mine.result)
    assert answer(client.generate("m", "c d", stream=False)).text == "c d"
    assert client.drain()
    client.close()
pid = fork(child)
assert answer(mine).text == WORDS
joined(pid)
client.close()
"""

GIVEN_CONTEXT = """
import zmq
with zmq.Context() as context, Client(endpoint, context=context) as client:
    stream = client.generate("m", WORDS, max_tokens=300)
    def child():
        inherited(stream.text)
        try:
            client.models()
        except errors.ConnectionFailed as error:
            assert "closed" in str(error)
        else:
            raise AssertionError
        with Client(endpoint) as own:
            assert own.generate("m", "c d", stream=False).text == "c d"
    joined(fork(child))
    assert stream.text() == WORDS
"""

ENDS = """
# Children that end as programs do: having done nothing, having asked, having forgotten or closed what they inherited.
# There is no open asyncio loop: a child that ends closes it, and with it takes the descriptors from its parent's epoll.
client, polled = Client(endpoint), PolledClient(endpoint)
stream, pending = client.generate("m", WORDS, max_tokens=1500), polled.generate("m", WORDS, stream=False, max_tokens=300)
threading.Thread(target=client.generate("m", WORDS, max_tokens=100_000).text, daemon=True).start()
pids = []
for how in range(4):
    pid = os.fork()
    if pid == 0:
        signal.alarm(10)
        if how == 1:
            assert client.generate("m", "c d", stream=False).text == "c d"
        elif how == 2:
            del client, polled, stream, pending
        elif how == 3:
            client.close()
            polled.close()
        sys.exit(0)
    pids.append(pid)
for pid in pids:
    joined(pid)
assert stream.text() == " ".join([WORDS] * 5)
"""

POOLS = """
import multiprocessing
client = Client(endpoint) if sys.argv[2] == "fork" else None

def answer(text):
    global client
    if client is None:
        client = Client(endpoint)
    return client.generate("m", text, stream=False).text

if __name__ == "__main__":
    if client is not None:
        assert answer("a b") == "a b"
    context = multiprocessing.get_context(sys.argv[2])
    with context.Pool(3) as pool:
        assert pool.map(answer, [f"n{number}" for number in range(60)]) == [f"n{number}" for number in range(60)]
        pool.close()
        pool.join()
        try:
            context.Process(target=answer, args=(Client(endpoint),)).start() if sys.argv[2] != "fork" else None
        except TypeError as error:
            assert "make one in each process" in str(error), error
        else:
            assert sys.argv[2] == "fork"
"""


@pytest.fixture(scope="module")
def controller() -> Iterator[ServedController]:
    with network("w", worker_arguments=("--slots", "64", "--delay-per-token", "0.001")) as (controller, _):
        yield controller


def run(program: str, *arguments: str) -> None:
    """Its exit code must be 0, and it must have nothing to complain of."""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", program, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=2 * PATIENCE_S, check=False)
    assert not ended.stderr, ended.stderr
    assert (ended.returncode, ended.stdout) == (0, "")


PROGRAMS = {"idle": IDLE, "busy": BUSY, "locked": LOCKED, "loop": ON_A_LOOP, "polled": POLLED, "context": GIVEN_CONTEXT, "ends": ENDS}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_forked_child_begins_anew_and_its_parent_goes_on(controller: ServedController, tmp_path: object, program: str) -> None:
    path = f"{tmp_path}/program.py"
    with open(path, "w") as file:
        file.write(PRELUDE + PROGRAMS[program])
    run(path, controller.clients)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_each_process_of_a_pool_has_a_client(controller: ServedController, tmp_path: object, method: str) -> None:
    path = f"{tmp_path}/pools.py"
    with open(path, "w") as file:
        file.write(PRELUDE + POOLS)
    run(path, controller.clients, method)
