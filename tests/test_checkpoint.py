"""Loading a model: fingerprints, and one sentence for each thing that can be wrong."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from zmqserve.backends.model_errors import ModelUnavailable
from zmqserve.backends.transformers_worker import ModelWorker
from zmqserve.errors import InvalidParameter
from zmqserve.worker import WorkerConfig

pytest.importorskip("torch")
pytest.importorskip("transformers")

from .fakes.tiny_llama import make_model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


def make_worker(directory: Path, **options: Any) -> ModelWorker:
    return ModelWorker(WorkerConfig(model=str(directory)), **{"device": "cpu", "threads": 1, **options})


def fingerprint_of(directory: Path, **options: Any) -> str:
    from zmqserve.backends import checkpoint
    from zmqserve.backends.load_options import LoadOptions

    return str(checkpoint.load(str(directory), LoadOptions(device="cpu", **options)).fingerprint())


def test_a_fingerprint_is_of_the_content(model_dir: Path, tmp_path: Path) -> None:
    """The same elsewhere; another one for another dtype, one changed weight, or another chat template."""
    from safetensors.torch import load_file, save_file

    same = shutil.copytree(model_dir, tmp_path / "same")
    assert fingerprint_of(same) == fingerprint_of(model_dir)
    others = [fingerprint_of(same, dtype="bfloat16")]
    weights = load_file(same / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] += 0.01
    save_file(weights, same / "model.safetensors", metadata={"format": "pt"})
    others.append(fingerprint_of(same))
    (same / "chat_template.jinja").write_text("{{ messages[0].content }}")
    others.append(fingerprint_of(same))
    assert len({fingerprint_of(model_dir), *others}) == 4


def load_error(directory: Path | str, **options: Any) -> str:
    with pytest.raises(ModelUnavailable) as caught:
        make_worker(Path(directory), **options).load()
    assert "\n" not in caught.value.message
    return str(caught.value.message)


def test_a_path_that_is_no_model_is_one_sentence(tmp_path: Path) -> None:
    assert "does not exist" in load_error(tmp_path / "none")
    assert "no config.json" in load_error(tmp_path)
    (tmp_path / "file").write_text("x")
    assert "is a file" in load_error(tmp_path / "file")


def test_a_model_that_neither_generates_nor_embeds_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "architectures": ["BertForSequenceClassification"]}))
    assert "is a BertForSequenceClassification, neither a causal language model" in load_error(tmp_path)


def test_a_checkpoint_that_lacks_weights_is_refused(model_dir: Path, tmp_path: Path) -> None:
    """transformers would make them up."""
    from safetensors.torch import load_file, save_file

    poor = shutil.copytree(model_dir, tmp_path / "poor")
    weights = load_file(poor / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, poor / "model.safetensors", metadata={"format": "pt"})
    assert "lacks the weights model.layers.1.mlp.up_proj.weight" in load_error(poor)


def test_a_broken_checkpoint_is_one_sentence(model_dir: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(model_dir, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"not a checkpoint")
    assert "cannot be loaded" in load_error(broken)


def test_a_name_that_the_hub_does_not_know_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelUnavailable, match="could not be had from the Hugging Face Hub"):
        ModelWorker(WorkerConfig(model="nobody/no-such-model"), device="cpu").load()


@pytest.mark.parametrize(("options", "named"), [({"device": "tpu-please"}, "device"), ({"dtype": "int3"}, "dtype")])
def test_a_device_or_dtype_that_is_none_is_named(model_dir: Path, options: dict[str, str], named: str) -> None:
    with pytest.raises(InvalidParameter) as caught:
        make_worker(model_dir, **options).load()
    assert caught.value.parameter == named


def test_missing_libraries_are_one_sentence_that_names_the_extra(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert load_error(model_dir) == ('the transformers backend needs torch, which is not installed: pip install "zmqserve[transformers]"')
