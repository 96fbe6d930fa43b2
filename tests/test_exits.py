"""Programs that end, or get signals, while answers are open: they end at once, with the right code and nothing to complain of."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import pytest

from tests.processes import PATIENCE_S, ServedController, network

pytestmark = pytest.mark.heavy

PRELUDE = """
import asyncio, atexit, itertools, os, random, select, signal, sys, threading, time
from zmqserve import AsyncClient, Client, PolledClient, errors
endpoint = sys.argv[1]
LONG = {"max_tokens": 100_000}

def interrupt_after(count, how=signal.SIGINT):
    '''A callable: at its count-th call, a thread sends the signal a moment later, while the main thread waits.'''
    calls = itertools.count(1)
    def called(*_):
        if next(calls) == count:
            threading.Timer(0.05, os.kill, (os.getpid(), how)).start()
    return called
"""

OPEN: dict[str, str] = {
    # What a program does before its end: it leaves answers open, in every way.
    "sync": """
client = Client(endpoint)
stream, other = client.generate("m", "a b", **LONG), client.generate("m", "a b", **LONG)
next(stream)
""",
    "threads": """
client = Client(endpoint)
streams = [client.generate("m", "a b", **LONG) for _ in range(4)]
for each in streams[1:]:
    threading.Thread(target=each.text, daemon=True).start()
next(streams[0])
""",
    "map": """
client = Client(endpoint)
results = client.map("m", (f"n{number}" for number in itertools.count()), concurrency=4)
assert [next(results).text for _ in range(10)] == [f"n{number}" for number in range(10)]
""",
    "generators, and a thread with the client's lock": """
# The end stops that thread, and ends the generators after that: they can't wait for it. With a thread in this module they would just stay.
def served():
    with Client(endpoint) as client, client.generate("m", "a b", **LONG) as stream:
        next(stream)
        yield client
clients, holds = served(), threading.Event()
client = next(clients)
results = client.map("m", (f"n{number}" for number in itertools.count()), concurrency=4)
assert next(results).text == "n0"
scope = {"lock": client._connection._mutex, "holds": holds, "sleep": time.sleep}
threading.Thread(target=exec, args=("with lock: holds.set(); sleep(60)", scope), daemon=True).start()
holds.wait()
""",
    "loop": """
async def main():
    client = AsyncClient(endpoint)
    left.append(client)
    left.extend([await client.generate("m", "a b", **LONG) for _ in range(3)])
    left.append(asyncio.ensure_future(client.generate("m", "a b", stream=False, **LONG)))
    results = client.map("m", (f"n{number}" for number in itertools.count()), concurrency=4)
    assert (await anext(results)).text == "n0"
    left.append(results)
    await anext(left[1])
left = []
asyncio.run(main())
""",
    "a loop that is never closed": """
async def main():
    client = AsyncClient(endpoint)
    left.extend([client, await client.generate("m", "a b", **LONG)])
    await anext(left[1])
left = []
loop = asyncio.new_event_loop()
loop.run_until_complete(main())
""",
    "polled": """
client = PolledClient(endpoint)
stream, pending = client.generate("m", "a b", **LONG), client.generate("m", "a b", stream=False, **LONG)
while not stream.take():
    select.select([client], [], [], 1)
    client.process()
""",
}

ENDS: dict[str, tuple[str, int, str]] = {
    # How it ends then, its exit code, and the last line of its standard error.
    "end of main": ("", 0, ""),
    "sys.exit": ("sys.exit(3)", 3, ""),
    "sys.exit in a thread's way": ("raise SystemExit", 0, ""),
    "exception": ("1 / 0", 1, "ZeroDivisionError: division by zero"),
    "SIGTERM": ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)", -signal.SIGTERM, ""),
    "SIGINT": ("os.kill(os.getpid(), signal.SIGINT); time.sleep(60)", -signal.SIGINT, "KeyboardInterrupt"),
}


@pytest.fixture(scope="module")
def controller() -> Iterator[ServedController]:
    with network("w", worker_arguments=("--slots", "64", "--delay-per-token", "0.005")) as (controller, _):
        yield controller


def run(controller: ServedController, program: str, *, options: tuple[str, ...] = (), stdin: str | None = None) -> tuple[int, str]:
    """Its exit code, and what it had to complain of."""
    command = [sys.executable, *options, *([] if stdin else ["-c", PRELUDE + program]), controller.clients]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, input=stdin, check=False)
    return ended.returncode, ended.stderr


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("program", OPEN)
def test_a_program_ends_with_open_answers(controller: ServedController, program: str, end: str) -> None:
    how, wanted, last = ENDS[end]
    # In development mode who does not close a socket is told so. An asyncio loop that is not closed complains there of itself.
    options = () if "never closed" in program else ("-X", "dev")
    code, complaints = run(controller, f"{OPEN[program]}\n{how}\n", options=options)
    lines = [line for line in complaints.splitlines() if "ResourceWarning: Unclosed socket <zmq." not in line]
    assert (code, lines[-1:]) == (wanted, [last] if last else []), complaints
    assert "ignored" not in complaints
    assert complaints.count("Traceback") == bool(last), complaints


INTERRUPTED: dict[str, str] = {
    "sync": """
with Client(endpoint) as client:
    told = interrupt_after(3)
    try:
        for chunk in client.generate("m", "a b", **LONG):
            told()
    except KeyboardInterrupt:
        assert client.generate("m", "c d", stream=False).text == "c d"
        sys.exit(7)
""",
    "whole": """
with Client(endpoint) as client:
    interrupt_after(1)()
    try:
        client.generate("m", "a b", stream=False, **LONG)
    except KeyboardInterrupt:
        assert client.generate("m", "c d", stream=False).text == "c d"
        sys.exit(7)
""",
    "map": """
with Client(endpoint) as client:
    told = interrupt_after(3)
    try:
        for _ in client.map("m", (f"n{number}" for number in itertools.count()), concurrency=4, progress=told):
            pass
    except KeyboardInterrupt:
        assert client.generate("m", "c d", stream=False).text == "c d"
        sys.exit(7)
""",
    "drain": """
with Client(endpoint) as client:
    stream = client.generate("m", "a b", **LONG)
    interrupt_after(1)()
    try:
        client.drain()
    except KeyboardInterrupt:
        sys.exit(7)
""",
    "loop": """
async def main():
    async with AsyncClient(endpoint) as client:
        told = interrupt_after(3)
        async for _ in client.generate("m", "a b", **LONG):
            told()
try:
    asyncio.run(main())
except KeyboardInterrupt:
    sys.exit(7)
""",
    "map on a loop": """
async def main():
    async with AsyncClient(endpoint) as client:
        told = interrupt_after(3)
        async for _ in client.map("m", (f"n{number}" for number in itertools.count()), concurrency=4, progress=told):
            pass
try:
    asyncio.run(main())
except KeyboardInterrupt:
    sys.exit(7)
""",
}

HANDLERS: dict[str, str] = {
    "closes the stream that is waited for": """
with Client(endpoint) as client:
    stream = client.generate("m", "a b", **LONG)
    signal.signal(signal.SIGTERM, lambda *_: stream.close())
    told = interrupt_after(3, signal.SIGTERM)
    for _ in stream:
        told()
    assert client.generate("m", "c d", stream=False).text == "c d"
    sys.exit(7)
""",
    "closes the client that is waited in": """
client = Client(endpoint)
signal.signal(signal.SIGTERM, lambda *_: client.close())
interrupt_after(1, signal.SIGTERM)()
try:
    client.generate("m", "a b", stream=False, **LONG)
except errors.ConnectionFailed:
    sys.exit(7)
""",
    "asks the client that is waited in": """
with Client(endpoint) as client:
    def handler(*_):
        began = time.monotonic()
        answers.append(client.generate("m", "c d", stream=False).text)
        assert time.monotonic() - began < 1.5, "it waits for nobody"
    answers = []
    signal.signal(signal.SIGTERM, handler)
    stream = client.generate("m", "a b", **LONG)
    threading.Thread(target=client.generate("m", "a b", **LONG).text, daemon=True).start()
    for count in range(5):
        told = interrupt_after(1, signal.SIGTERM)
        told()
        while len(answers) == count:
            next(stream)
    assert answers == ["c d"] * 5
    os._exit(7)
""",
    "exits": """
client = Client(endpoint)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
interrupt_after(1, signal.SIGTERM)()
client.generate("m", "a b", stream=False, **LONG)
""",
    "on a loop": """
async def main():
    async with AsyncClient(endpoint) as client:
        stream = client.generate("m", "a b", **LONG)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stream.close)
        told = interrupt_after(3, signal.SIGTERM)
        async for _ in stream:
            told()
asyncio.run(main())
sys.exit(7)
""",
    "closes streams at any instruction": """
# A thousand signals a second, in whatever the main thread is about. A handler closes what is open there and in a thread.
random.seed(5)
with Client(endpoint) as client:
    def handler(*_):
        for each in [stream, *others]:
            each.close()
        signal.setitimer(signal.ITIMER_REAL, random.uniform(0.0001, 0.001))
    stream, others = client.generate("m", "x", **LONG), []
    ends_s = time.monotonic() + 4
    def beside():
        while time.monotonic() < ends_s:
            others[:] = [client.generate("m", "a b", **LONG)]
            others[0].text if random.random() < 0.5 else list(others[0])
    thread = threading.Thread(target=beside)
    thread.start()
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    count = 0
    while time.monotonic() < ends_s:
        stream = client.generate("m", "a b", **LONG)
        list(stream)
        count += 1
    thread.join()  # what it opened at the very end is closed by a signal, too
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    assert count > 20, count
    assert client.generate("m", "c d", stream=False).text == "c d"
sys.exit(7)
""",
}

LATE: dict[str, str] = {
    "a client that was used": """
client = Client(endpoint)
@atexit.register
def last():
    assert client.generate("m", "c d", stream=False).text == "c d"
    os.write(1, b"done")
    client.close()
    os._exit(7)
stream = client.generate("m", "a b", **LONG)
next(stream)
""",
    "a new client": """
@atexit.register
def last():
    with Client(endpoint) as client:
        assert client.generate("m", "c d", stream=False).text == "c d"
        assert [r.text for r in client.map("m", ["a", "b"])] == ["a", "b"]
    os._exit(7)
""",
    "a client on a loop": """
client = AsyncClient(endpoint)
async def main():
    async with client:
        assert (await client.generate("m", "c d", stream=False)).text == "c d"
@atexit.register
def last():
    asyncio.run(main())
    os._exit(7)
""",
}


@pytest.mark.parametrize("case", [*INTERRUPTED])
def test_an_interrupt_ends_the_waiting_and_leaves_the_client_usable(controller: ServedController, case: str) -> None:
    assert run(controller, INTERRUPTED[case]) == (7, "")


@pytest.mark.parametrize("case", [*HANDLERS])
def test_a_signal_handler_may_use_the_client_that_it_interrupts(controller: ServedController, case: str) -> None:
    assert run(controller, HANDLERS[case]) == (7, "")


@pytest.mark.parametrize("case", [*LATE])
def test_a_client_may_be_used_when_the_interpreter_ends(controller: ServedController, case: str) -> None:
    assert run(controller, LATE[case]) == (7, "")


def test_the_asyncio_prompt_takes_it(controller: ServedController) -> None:
    """A running loop at the top level, as in notebooks: AsyncClient is awaited there, and Client just works."""
    typed = [
        "from zmqserve import AsyncClient, Client",
        f"client = AsyncClient({controller.clients!r})",
        "stream = await client.generate('m', 'a b')",
        "print('first:', (await anext(stream)).text)",
        "print('rest:', await stream.text())",
        f"print('blocking:', Client({controller.clients!r}).generate('m', 'c d', stream=False).text)",
        "left = await client.generate('m', 'a b', max_tokens=100_000)",
        "",
    ]
    command = [sys.executable, "-m", "asyncio"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, input="\n".join(typed), check=False)
    assert ended.returncode == 0
    assert all(part in ended.stdout for part in ("first: a", "rest: a b", "blocking: c d")), ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    assert "ignored" not in ended.stderr


@pytest.mark.skipif(find_spec("uvloop") is None, reason="uvloop is not installed")
@pytest.mark.parametrize("program", ["loop"])
def test_another_event_loop_will_do(controller: ServedController, program: str) -> None:
    for source, wanted in ((OPEN[program], 0), (INTERRUPTED[program], 7), (INTERRUPTED["map on a loop"], 7)):
        assert run(controller, source.replace("asyncio.run(", "__import__('uvloop').run(")) == (wanted, "")


def test_a_kernel_that_runs_a_loop_takes_both(controller: ServedController, tmp_path: Any) -> None:
    """What a notebook's kernel does: cells run as tasks of one loop that goes on between them."""
    program = """
async def cell(source, scope):
    import ast
    code = compile(source, "cell", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    result = eval(code, scope)
    if asyncio.iscoroutine(result):
        await result
async def kernel():
    scope = {"AsyncClient": AsyncClient, "Client": Client, "endpoint": endpoint, "asyncio": asyncio}
    for source in [
        "client = AsyncClient(endpoint); stream = await client.generate('m', 'a b')",
        "text = await stream.text()",
        "blocking = Client(endpoint); assert blocking.generate('m', text, stream=False).text == 'a b'",
        "left = [await client.generate('m', text, max_tokens=100_000), blocking.generate('m', text, max_tokens=100_000)]",
    ]:
        await asyncio.ensure_future(cell(source, scope))
asyncio.run(kernel())
sys.exit(7)
"""
    assert run(controller, program) == (7, "")
