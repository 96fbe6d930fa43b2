"""The registry file of hosted models, their tokens, and the command line."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from zmqserve import Client, WorkerConfig
from zmqserve.backends.hf_registry import HostedModel, read_registry
from zmqserve.backends.hf_token import token_of
from zmqserve.backends.huggingface_api_worker import HuggingfaceApiWorker
from zmqserve.cli import main
from zmqserve.errors import InvalidParameter

from .fakes.hosted import HELLO, hosted, serving
from .fakes.upstream import FakeUpstream, chat, piece, words
from .processes import Served, ServedController, zmqserve

pytest.importorskip("huggingface_hub")

PAGE = Path(__file__).parents[1] / "docs" / "backends.md"
TOML = """
[[models]]
name = "big"
model = "org/big"
base_url = "https://example.com/v1"
server = "vllm"
extra = ["top_k"]
token_env = "BIG_TOKEN"
context_length = 8192
aliases = ["b"]
slots = 16
retries = 1
connect_timeout_s = 2
first_token_timeout_s = 30.5
token_timeout_s = 10

[[models]]
name = "vectors"
api = "feature_extraction"
provider = "hf-inference"
"""


def write(directory: Path, content: object, name: str = "models.json") -> Path:
    path = directory / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_toml_and_json_say_the_same(tmp_path: Path) -> None:
    import tomllib

    models = read_registry(write(tmp_path, TOML, "models.toml"))
    assert models == read_registry(write(tmp_path, tomllib.loads(TOML)))
    big, vectors = models
    assert (big.upstream_name, big.dialect, big.slots, big.first_token_timeout_s, big.connect_timeout_s) == ("org/big", "vllm", 16, 30.5, 2)
    assert (vectors.upstream_name, vectors.provider, vectors.slots) == ("vectors", "hf-inference", 8)


def test_the_registry_of_the_docs_is_one(tmp_path: Path) -> None:
    (block,) = re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    llama, vectors = read_registry(write(tmp_path, block, "models.toml"))
    assert (llama.aliases, llama.dialect, vectors.api) == (["big"], "vllm", "feature_extraction")


URL = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"nmae": "x"}, "model 1: name is missing"),
        ({"name": ""}, "model 1: name must be 1 to 256 characters"),
        ({"name": 5}, "model 1: name is wrong: expected str, got int"),
        ({"name": "a", "base_ulr": URL}, "model 'a': 'base_ulr' is not a key; known: name, model, api, base_url"),
        ({"name": "a", "slots": "8"}, "model 'a': slots is wrong: expected int, got str"),
        ({"name": "a", "slots": 0}, "model 'a': slots must be an integer from 1 to 100, got 0"),
        ({"name": "a", "retries": -1}, "model 'a': retries must be an integer from 0 to 20, got -1"),
        ({"name": "a", "context_length": -1}, "model 'a': context_length must be"),
        ({"name": "a", "token_timeout_s": 0}, "model 'a': token_timeout_s must be a number of seconds above 0, got 0"),
        ({"name": "a", "aliases": "b"}, "model 'a': aliases is wrong: expected array, got str"),
        ({"name": "a", "aliases": [1]}, "model 'a': aliases[0] is wrong: expected str, got int"),
        ({"name": "a", "api": "talk"}, "model 'a': api must be one of chat, text_generation, feature_extraction, got 'talk'"),
        ({"name": "a", "base_url": "ftp://x"}, "model 'a': base_url must begin with http:// or https://"),
        ({"name": "a", "base_url": "http://x:port"}, "model 'a': base_url is no URL"),
        ({"name": "a", "base_url": "http://me:pa55word@x"}, "model 'a': base_url must not hold a user or password"),
        ({"name": "a", "base_url": URL, "provider": "together"}, "model 'a': base_url and provider cannot both be set"),
        ({"name": "a", "token_env": "A", "token_file": "b"}, "model 'a': token_env and token_file cannot both be set"),
        ({"name": "a", "api": "text_generation", "provider": "together"}, "model 'a': api text_generation needs a base_url"),
        ({"name": "a", "server": "vllm"}, "model 'a': server is for a base_url"),
        (
            {"name": "a", "server": "vllm", "base_url": URL, "api": "feature_extraction"},
            "model 'a': server must be one of openai, tgi for api feature_extraction, got 'vllm'",
        ),
        ({"name": "a", "extra": ["top_q"]}, "model 'a': extra must be a list of some of ignore_eos, min_p"),
        ({"name": "a", "api": "feature_extraction", "extra": ["top_k"]}, "model 'a': extra is for api chat"),
        ("a", "model 1: must be a table of settings, got str"),
    ],
)
def test_a_wrong_entry_is_one_sentence(tmp_path: Path, entry: Any, says: str) -> None:
    path = write(tmp_path, {"models": [entry]})
    with pytest.raises(InvalidParameter) as caught:
        read_registry(path)
    message = caught.value.message
    assert message.startswith(f"{path}: {says}"), message
    assert "\n" not in message
    assert "pa55word" not in message


@pytest.mark.parametrize(
    ("content", "name", "says"),
    [
        ({"models": []}, "m.json", "at least one model"),
        ({"model": []}, "m.json", "must hold models.*it holds model"),
        ([], "m.json", "must hold models.*it holds a list"),
        ({}, "m.json", "it holds nothing"),
        ("{", "m.json", "is not JSON"),
        ("[" * 100_000, "m.json", "is not JSON"),
        ("a = ", "m.toml", "is not TOML"),
        ("", "m.yaml", r"must end in \.toml or \.json"),
        ({"models": [{"name": "a"}, {"name": "a"}]}, "m.json", "the name 'a' is taken by model 'a'"),
        ({"models": [{"name": "a"}, {"name": "b", "aliases": ["a"]}]}, "m.json", "model 'b': the name 'a' is taken by model 'a'"),
    ],
)
def test_a_wrong_file_is_one_sentence(tmp_path: Path, content: object, name: str, says: str) -> None:
    path = write(tmp_path, content, name)
    with pytest.raises(InvalidParameter, match=says) as caught:
        read_registry(path)
    assert caught.value.message.startswith(str(path))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter, match="cannot be read: No such file"):
        read_registry(tmp_path / "none.toml")


# --- tokens ------------------------------------------------------------------------------------


def token(**settings: str) -> Any:
    return token_of(HostedModel(name="m", **settings), "file: model 'm'")


def test_a_token_comes_from_where_it_is_said_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", " abcd \n")
    path = tmp_path / "token"
    path.write_text("efgh\n")
    path.chmod(0o640)
    assert token(token_env="MY_TOKEN").value == "abcd"
    assert token(token_file=str(path)).value == "efgh"
    assert token(base_url=URL).value is None
    monkeypatch.setenv("HF_TOKEN", "hf_ijkl")
    assert token().value == "hf_ijkl"
    assert token(base_url=URL).value is None


@pytest.mark.parametrize(
    ("content", "mode", "says"),
    [
        (b"abcd", 0o644, r"is open to every user of this machine \(mode 644\): chmod 600 it"),
        (b"abcd", 0o602, "mode 602"),
        (b" \n", 0o600, "is empty"),
        (b"ab cd", 0o600, "is no token"),
        ("ab\u00e9cd".encode(), 0o600, "is no token"),
        (b"abcd\xff\xfe", 0o600, "it is not text"),
        (None, 0o600, "No such file"),
    ],
)
def test_a_token_file_that_will_not_do(tmp_path: Path, content: bytes | None, mode: int, says: str) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
        path.chmod(mode)
    with pytest.raises(InvalidParameter, match=says) as caught:
        token(token_file=str(path))
    assert caught.value.message.startswith("file: model 'm': token_file")
    assert "abcd" not in caught.value.message


def test_a_variable_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MY_TOKEN", raising=False)
    with pytest.raises(InvalidParameter, match="environment variable MY_TOKEN is not set"):
        token(token_env="MY_TOKEN")


def test_a_provider_needs_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(InvalidParameter, match="needs a token"):
        token(provider="together")


def test_a_provider_that_there_is_not_is_refused_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcd")
    for model, says in (
        (HostedModel(name="m", provider="nobody"), "provider must be auto or one that serves api chat .*together.*, got 'nobody'"),
        (HostedModel(name="m", provider="groq", api="feature_extraction"), "one that serves api feature_extraction"),
    ):
        with pytest.raises(InvalidParameter, match=says):
            HuggingfaceApiWorker(WorkerConfig(), [model]).load()


def test_a_provider_is_asked_with_its_own_name_for_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through Hugging Face's router, on a transport that stands for the network."""
    from huggingface_hub import set_async_client_factory
    from huggingface_hub.inference._providers import _common
    from huggingface_hub.utils._http import default_async_client_factory

    from zmqserve.backends.hf_client import http

    seen = []

    async def answer(request: Any) -> Any:
        seen.append((str(request.url), request.headers["authorization"], json.loads(request.content)))
        events = [piece("one"), piece(" two", finish="stop")]
        data = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        return http.Response(200, headers={"content-type": "text/event-stream"}, content=data.encode())

    mapping = {"hf_model_id": "org/m", "providerId": "their-m", "status": "live", "task": "conversational"}
    helper: Any = _common
    known = helper.InferenceProviderMapping(provider="together", **mapping)
    monkeypatch.setitem(_common.HARDCODED_MODEL_INFERENCE_MAPPING["together"], "org/m", known)
    monkeypatch.setenv("HF_TOKEN", "hf_abcd")
    set_async_client_factory(lambda: http.AsyncClient(transport=http.MockTransport(answer)))
    try:
        with serving(HostedModel(name="m", model="org/m", provider="together"), HostedModel(name="auto", model="org/m")) as client:
            assert client.chat("m", HELLO, stream=False).text == "one two"
            assert client.chat("auto", HELLO, stream=False).text == "one two"
    finally:
        set_async_client_factory(default_async_client_factory)
    assert [(url, token, body["model"]) for url, token, body in seen] == [
        ("https://router.huggingface.co/together/v1/chat/completions", "Bearer hf_abcd", "their-m"),
        ("https://router.huggingface.co/v1/chat/completions", "Bearer hf_abcd", "org/m"),
    ]


# --- the command -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give --model or --registry"),
        (["--registry", "none.toml"], "none.toml: cannot be read"),
        (["--registry", "none.toml", "--model", "m", "--api", "chat"], "leave out what is for one model (api, model)"),
        (["--model", "m", "--endpoint", "nowhere"], "command line: model 'm': base_url must begin with http"),
        (["--model", "m", "--endpoint", URL, "--token-env", "NO_SUCH_VARIABLE"], "environment variable NO_SUCH_VARIABLE is not set"),
    ],
)
def test_wrong_options_are_one_sentence(arguments: list[str], says: str) -> None:
    ended = zmqserve("worker", "hf", *arguments)
    (sentence,) = [line for line in ended.stderr.splitlines() if line.startswith("zmqserve: ")]
    assert (ended.returncode, "Traceback" in ended.stderr) == (2, False)
    assert says in sentence


def test_other_backends_still_need_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["worker", "echo"])
    assert "required: --model" in capsys.readouterr().err


@pytest.mark.heavy
def test_a_registrys_models_are_served_and_are_back_after_their_controller(tmp_path: Path) -> None:
    with FakeUpstream(words()) as upstream:
        entries = [{"name": name, "base_url": upstream.url, "aliases": [name.upper()], "slots": 1} for name in ("a", "b", "c")]
        path = write(tmp_path, {"models": entries})
        controller = ServedController()
        clients, workers = controller.clients, controller.workers
        with Served("worker", "hf", "--registry", str(path), "--worker-name", "w", "--controller", workers):
            try:
                controller.wait_ready("w")
                with Client(clients) as client:
                    assert sorted(model.name for model in client.models()) == ["a", "b", "c"]
                    assert client.chat("B", HELLO, stream=False).text == "one two"
            finally:
                controller.end()
            with ServedController(clients, workers) as again, Client(clients) as client:
                again.wait_ready("w")
                assert sorted(model.name for model in client.models()) == ["a", "b", "c"]
                assert client.chat("C", HELLO, stream=False).text == "one two"


@pytest.mark.heavy
def test_one_model_by_options(tmp_path: Path) -> None:
    with FakeUpstream(chat(piece("ok", finish="stop"))) as upstream, ServedController() as controller:
        options = ("--endpoint", upstream.url, "--server", "vllm", "--context-length", "100", "--name", "mine", "--slots", "3")
        arguments = ("--model", "org/name", "--worker-name", "w", "--controller", controller.workers, *options)
        with Served("worker", "hf", *arguments), Client(controller.clients) as client:
            controller.wait_ready("w")
            assert client.chat("mine", HELLO, stream=False, top_k=4).text == "ok"
            (model,) = client.models()
            assert (model.name, model.context_length, model.slots, model.card.source) == ("mine", 100, 3, "org/name")
            assert (upstream.seen[0].body["model"], upstream.seen[0].body["top_k"]) == ("org/name", 4)


def test_the_core_and_the_worker_import_no_library() -> None:
    import subprocess

    code = "import sys, zmqserve, zmqserve.backends.huggingface_api_worker; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_worker_of_one_model_is_named_after_it() -> None:
    assert [model.name for model in HuggingfaceApiWorker(WorkerConfig(model="org/name")).models] == ["org/name"]
    with pytest.raises(InvalidParameter, match="the name 'm' is taken"):
        HuggingfaceApiWorker(WorkerConfig(), [hosted(URL), hosted(URL)])
