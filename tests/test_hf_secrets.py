"""A hosted model's token: sent to its upstream and shown to nobody."""

from __future__ import annotations

import pickle
import re
import sys
from pathlib import Path

import pytest

from zmqserve import Client, WorkerConfig
from zmqserve.backends.hf_token import Token
from zmqserve.backends.huggingface_api_worker import HuggingfaceApiWorker
from zmqserve.errors import ZmqserveError

from .fakes.hosted import HELLO, hosted, serving
from .fakes.upstream import Exchange, FakeUpstream, Handler, chat, piece, words
from .processes import Served, ServedController

pytest.importorskip("huggingface_hub")

SECRET = "hf_SecretThatNobodyMaySee0123456789"


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(SECRET + "\n")
    path.chmod(0o600)
    return path


def repeats_the_token(code: int) -> Handler:
    async def handle(exchange: Exchange) -> None:
        assert exchange.headers["authorization"] == f"Bearer {SECRET}"
        await exchange.respond(code, {"error": {"message": f"you sent {exchange.headers['authorization']}"}})

    return handle


async def repeats_in_the_stream(exchange: Exchange) -> None:
    await exchange.begin()
    await exchange.chunk(b"data: {" + SECRET.encode() + b"\n\n")
    await exchange.end()


def test_no_token_leaves_for_a_url_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    with FakeUpstream(words()) as upstream, serving(hosted(upstream.url)) as client:
        client.chat("m", HELLO, stream=False)
        assert "authorization" not in upstream.seen[0].headers


@pytest.mark.heavy
def test_the_token_is_shown_nowhere(token_file: Path) -> None:
    """A process at its most talkative, an upstream that repeats the token in every way, all that clients can see."""
    shown: list[str] = []
    handlers = (
        repeats_the_token(500),
        repeats_the_token(401),
        repeats_the_token(400),
        repeats_in_the_stream,
        chat(piece("ok", finish="stop")),
    )
    with FakeUpstream(*handlers) as upstream, ServedController() as controller:
        url = f"{upstream.url}/v1?key={SECRET}"
        options = ("--endpoint", url, "--token-file", str(token_file), "--retries", "0", "--log-level", "debug")
        arguments = ("worker", "hf", "--model", "m", "--worker-name", "hosted", "--controller", controller.workers, *options)
        with Served(*arguments, env={"HF_DEBUG": "1", "HF_HUB_VERBOSITY": "debug", "HF_HUB_OFFLINE": "1"}) as worker:
            controller.wait_ready("hosted")
            with Client(controller.clients) as client:
                for _ in handlers[:-1]:
                    with pytest.raises(ZmqserveError) as caught:
                        client.chat("m", HELLO, stream=False)
                    shown += [repr(caught.value), caught.value.message, str(caught.value.data)]
                shown += [client.chat("m", HELLO, stream=False).text, repr(client.status()), repr(client.models())]
        shown += [*worker.output, *controller.output]
    everything = "\n".join(shown)
    assert "you sent Bearer [hidden]" in everything
    assert f"file {token_file}" in everything
    assert "Traceback" not in everything
    assert [line for line in shown if SECRET in line] == []


def test_an_upstream_that_repeats_the_token_is_not_quoted(token_file: Path) -> None:
    with FakeUpstream(repeats_the_token(401)) as upstream, serving(hosted(upstream.url, token_file=str(token_file))) as client:
        with pytest.raises(ZmqserveError, match=r"Bearer \[hidden\]") as caught:
            client.chat("m", HELLO, stream=False)
    assert SECRET not in repr(caught.value)


def test_reprs_and_pickles_hide_the_token() -> None:
    token = Token(SECRET, "a test")
    assert SECRET not in repr(token)
    with pytest.raises(TypeError, match="not pickled"):
        pickle.dumps(token)


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("zmqserve.backends.hf_")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ZmqserveError, match=re.escape('pip install "zmqserve[hf]"')):
        HuggingfaceApiWorker(WorkerConfig(model="m"), [hosted("http://127.0.0.1:9")]).load()
