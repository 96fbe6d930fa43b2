"""LoRA adapters: models of their own, beside their base and at the same time."""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from zmqserve.backends.load_options import LoadOptions
from zmqserve.backends.model_errors import ModelUnavailable
from zmqserve.backends.transformers_worker import ModelWorker
from zmqserve.errors import InvalidParameter
from zmqserve.messages import CountTokens, Generate, pack_ids
from zmqserve.params import SamplingParams
from zmqserve.worker import WorkerConfig

from .fakes.asked import AskedJob, answer_of
from .fakes.tiny_llama import make_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

# peft asks for it by the old name.
pytestmark = [pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"), pytest.mark.timeout(300)]

PROMPT = [5, 6, 7, 8]
TOKENS = 20


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


def make_adapter(base: Path, directory: Path, seed: int, **options: Any) -> Path:
    """One with random weights, large enough that answers are others."""
    torch.manual_seed(seed)
    settings = peft.LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False, **options})
    peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), settings).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def adapters(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("adapters")
    return {name: str(make_adapter(model_dir, root / name, seed)) for seed, name in enumerate(("poet", "clerk"))}


def test_an_adapter_that_changes_nothing_changes_nothing_in_bfloat16(model_dir: Path, tmp_path: Path) -> None:
    """The positions of a long text are in float32 buffers, which must stay so beside weights in bfloat16."""
    from zmqserve.backends import checkpoint, lora_model

    identity = make_adapter(model_dir, tmp_path / "identity", 0, init_lora_weights=True)
    base = checkpoint.load(str(model_dir), LoadOptions(device="cpu", dtype="bfloat16"))
    adapted = lora_model.with_adapter(base, "identity", str(identity))
    ids = torch.arange(120)[None] % 100 + 5
    with torch.inference_mode():
        assert torch.equal(base.forward(ids, None)[0], adapted.forward(ids, None)[0])


def expected_of(model_dir: Path, adapter: str | None) -> list[int]:
    """What transformers and peft generate."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    out = model.eval().generate(
        input_ids=torch.tensor([PROMPT]), attention_mask=torch.ones(1, 4), max_new_tokens=TOKENS, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    return list(out[0, 4:].tolist())


def worker_of(model_dir: Path, lora: dict[str, str]) -> ModelWorker:
    return ModelWorker(WorkerConfig(model=str(model_dir)), device="cpu", threads=1, lora=lora)


@pytest.fixture(scope="module")
def worker(model_dir: Path, adapters: dict[str, str]) -> Iterator[ModelWorker]:
    made = worker_of(model_dir, adapters)
    made.cards = made.load()
    asyncio.run(answer(made, "tiny"))
    yield made
    made.close()


async def answer(worker: ModelWorker, name: str) -> list[int]:
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    job = AskedJob(Generate(1, name, token_ids=pack_ids(PROMPT), params=params))
    return [token_id async for delta in answer_of(worker, job) for token_id in delta.token_ids]


def test_base_and_adapters_answer_at_once_each_as_peft_does(worker: ModelWorker, model_dir: Path, adapters: dict[str, str]) -> None:
    names = ["tiny", "poet", "clerk"] * 2

    async def all_of_them() -> list[list[int]]:
        return list(await asyncio.gather(*(answer(worker, name) for name in names)))

    answers = asyncio.run(all_of_them())
    assert answers == [expected_of(model_dir, adapters.get(name)) for name in names]
    assert len({tuple(ids) for ids in answers}) == 3


def test_adapters_are_models_of_their_own(worker: ModelWorker, adapters: dict[str, str]) -> None:
    base, poet, clerk = worker.cards
    assert [card.name for card in worker.cards] == ["tiny", "poet", "clerk"]
    assert (poet.source, clerk.source) == (adapters["poet"], adapters["clerk"])
    assert len({base.fingerprint, poet.fingerprint, clerk.fingerprint}) == 3
    assert poet.verbs == base.verbs
    assert asyncio.run(worker.count_tokens(CountTokens(1, "poet", prompt="the fox"))) > 0


def test_the_bases_weights_are_in_memory_once(worker: ModelWorker) -> None:
    tensors = [{each.data_ptr() for each in model.checkpoint.model.parameters()} for model in worker._models.values()]
    base, poet, clerk = tensors
    assert base <= poet
    assert base <= clerk
    assert not (poet - base) & (clerk - base)


def test_the_fingerprint_tells_of_an_adapters_strength(model_dir: Path, adapters: dict[str, str], tmp_path: Path) -> None:
    """It is in its settings, and in no weight."""
    from zmqserve.backends import checkpoint, lora_model

    stronger = shutil.copytree(adapters["poet"], tmp_path / "stronger")
    settings = json.loads((stronger / "adapter_config.json").read_text())
    (stronger / "adapter_config.json").write_text(json.dumps({**settings, "lora_alpha": 32}))
    base = checkpoint.load(str(model_dir), LoadOptions(device="cpu"))
    paths = [adapters["poet"], str(shutil.copytree(adapters["poet"], tmp_path / "same")), str(stronger)]
    prints = [lora_model.with_adapter(base, "poet", path).fingerprint() for path in paths]
    assert prints[0] == prints[1] != prints[2]


def load_error(model_dir: Path, path: Path | str) -> str:
    with pytest.raises(ModelUnavailable) as caught:
        worker_of(model_dir, {"poet": str(path)}).load()
    assert "\n" not in caught.value.message
    assert caught.value.message.startswith(f"lora 'poet': {path} ")
    return str(caught.value.message)


def test_a_path_without_an_adapter_is_one_sentence(model_dir: Path, tmp_path: Path) -> None:
    assert "is no directory" in load_error(model_dir, tmp_path / "none")
    assert "no adapter_config.json" in load_error(model_dir, tmp_path)


def test_an_adapter_that_does_not_fit_is_one_sentence(model_dir: Path, adapters: dict[str, str], tmp_path: Path) -> None:
    """It would be left out, or made up, without a word."""
    from safetensors.torch import load_file, save_file

    weights = load_file(Path(adapters["poet"]) / "adapter_model.safetensors")
    for why, changed in {
        "unexpected": {**weights, **{name.replace("layers.1.", "layers.7."): weight.clone() for name, weight in weights.items()}},
        "mismatched": {name: torch.zeros(4, 99) if "lora_A" in name else weight for name, weight in weights.items()},
        "missing": dict(list(weights.items())[1:]),
    }.items():
        other = shutil.copytree(adapters["poet"], tmp_path / why)
        save_file(changed, other / "adapter_model.safetensors")
        assert f"does not fit LlamaForCausalLM: {why} model.layers." in load_error(model_dir, other)
    other = shutil.copytree(adapters["poet"], tmp_path / "target")
    settings = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**settings, "target_modules": ["no_such_proj"]}))
    assert "no_such_proj" in load_error(model_dir, other)


def test_names_on_the_command_line(model_dir: Path, adapters: dict[str, str]) -> None:
    parser = argparse.ArgumentParser()
    ModelWorker.add_arguments(parser.add_argument_group())

    def given(*options: str) -> ModelWorker:
        return ModelWorker.from_arguments(WorkerConfig(model=str(model_dir)), parser.parse_args(list(options)))

    assert given("--lora", "a=x", "--lora", "b=y=z")._lora == {"a": "x", "b": "y=z"}
    for options in (["--lora", "poet"], ["--lora", "=x"], ["--lora", "a="], ["--lora", "a=x", "--lora", "a=y"]):
        with pytest.raises(InvalidParameter) as caught:
            given(*options)
        assert caught.value.parameter == "lora"
    with pytest.raises(InvalidParameter, match="is the model's own name"):
        given("--lora", f"tiny={adapters['poet']}").load()
