"""What VLLMWorker is told and what it tells, as far as that needs no vLLM."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from zmqserve.backends.vllm_adapters import adapters_of, allowed_rank
from zmqserve.backends.vllm_engine import EngineFigures, split_arguments
from zmqserve.backends.vllm_fingerprint import directory_of, fingerprint
from zmqserve.backends.vllm_worker import VLLMWorker
from zmqserve.errors import BackendError, InvalidParameter
from zmqserve.params import SamplingParams
from zmqserve.worker import WorkerConfig


def test_without_vllm_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(BackendError) as caught:
        VLLMWorker(WorkerConfig(model="smollm2-135m")).load()
    assert caught.value.message.endswith('pip install "zmqserve[vllm]"')
    assert "\n" not in caught.value.message


def test_every_parameter_is_honoured() -> None:
    assert set(SamplingParams.__struct_fields__) <= VLLMWorker.honours


def test_engine_arguments_are_names_and_values() -> None:
    found = split_arguments(["tensor_parallel_size=2", "--enforce-eager", 'hf_overrides={"a": "b=c"}'])
    assert found == {"tensor_parallel_size": "2", "enforce_eager": "true", "hf_overrides": '{"a": "b=c"}'}


@pytest.mark.parametrize("texts", [["=1"], [""], ["a=1", "a=2"], ["max-num-seqs=1", "max_num_seqs=2"]])
def test_engine_arguments_that_are_none_are_refused(texts: list[str]) -> None:
    with pytest.raises(InvalidParameter, match="--engine-arg"):
        split_arguments(texts)


def write_model(directory: Path, *, weight: int = 1, middle: int = 0, size: int = 300_000) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text('{"hidden_size": 8}')
    (directory / "README.md").write_text(str(directory))
    header = json.dumps({"w": {"dtype": "F32", "shape": [weight], "data_offsets": [0, 4]}}).encode()
    body = bytearray(size)
    body[size // 2 :: 1000] = bytes([middle]) * len(body[size // 2 :: 1000])
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(body))
    return directory


def test_a_fingerprint_stands_for_the_files_and_not_for_their_place(tmp_path: Path) -> None:
    one = write_model(tmp_path / "one")
    copy = Path(shutil.copytree(one, tmp_path / "copy"))
    (copy / "README.md").write_text("words about it change nothing")
    first = fingerprint([one], ["float32"])
    assert fingerprint([copy], ["float32"]) == first
    others = [
        fingerprint([one], ["bfloat16"]),
        fingerprint([write_model(tmp_path / "shape", weight=2)], ["float32"]),
        fingerprint([write_model(tmp_path / "weights", middle=1)], ["float32"]),
        fingerprint([one, write_model(tmp_path / "adapter", middle=2)], ["float32"]),
    ]
    large = [fingerprint([write_model(tmp_path / f"large{k}", middle=k, size=2**24)], ["float32"]) for k in range(2)]
    (copy / "config.json").write_text('{"hidden_size": 9}')
    others.append(fingerprint([copy], ["float32"]))
    assert len({first, *others, *large}) == 8
    assert directory_of(str(one), None) == one


def test_an_adapter_is_read_for_its_rank(tmp_path: Path) -> None:
    for name, text in (("good", '{"r": 12}'), ("bad", "{}"), ("huge", '{"r": 9999}'), ("none", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(text)
    (adapter,) = adapters_of({"mine": str(tmp_path / "good")})
    assert (adapter.name, adapter.path, allowed_rank(adapter.rank)) == ("mine", tmp_path / "good", 16)
    for name in ("bad", "huge", "none"):
        with pytest.raises(BackendError, match=f"lora 'mine': .*{name}"):
            adapters_of({"mine": str(tmp_path / name)})


def test_figures_are_the_last_of_each_scheduler() -> None:
    class Stats:
        def __init__(self, waiting: int, skipped: int) -> None:
            self.num_waiting_reqs, self.num_skipped_waiting_reqs = waiting, skipped

    figures = EngineFigures()
    figures.record(scheduler_stats=Stats(5, 0), engine_idx=0)
    figures.record(scheduler_stats=Stats(2, 1), engine_idx=0)
    figures.record(scheduler_stats=Stats(4, 0), engine_idx=1)
    figures.record(scheduler_stats=None, engine_idx=1)
    assert figures.waiting == 7
    assert 0 <= figures.age_s() < 60
