"""What VLLMWorker is told and what it tells, as far as that needs no vLLM."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from zmqserve.backends import vllm_engine, vllm_worker
from zmqserve.backends.vllm_adapters import adapters_of, allowed_rank
from zmqserve.backends.vllm_engine import EngineFigures, split_arguments
from zmqserve.backends.vllm_fingerprint import directory_of, fingerprint
from zmqserve.backends.vllm_params import refused, sampling
from zmqserve.backends.vllm_vocabulary import ModelVocabulary
from zmqserve.backends.vllm_worker import VLLMWorker, _check_stops
from zmqserve.errors import BackendError, InvalidParameter
from zmqserve.messages import Embed
from zmqserve.params import Guided, SamplingParams
from zmqserve.worker import WorkerConfig

from .fakes.tiny_bert import make_encoder


def test_without_vllm_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(BackendError) as caught:
        VLLMWorker(WorkerConfig(model="smollm2-135m")).load()
    assert caught.value.message.endswith('pip install "zmqserve[vllm]"')
    assert "\n" not in caught.value.message


def test_every_parameter_is_honoured() -> None:
    assert set(SamplingParams.__struct_fields__) <= VLLMWorker.honours


def test_stop_ids_that_would_end_the_engine_are_refused() -> None:
    """Some versions of vLLM look at them in the engine's process only."""
    _check_stops(SamplingParams(stop_token_ids=[9], min_tokens=1), size=10, ends={0, 1})
    _check_stops(SamplingParams(stop_token_ids=list(range(500))), size=500, ends={0, 1})
    for ids, size in (([10], 10), (list(range(2, 129)), 500)):
        with pytest.raises(InvalidParameter) as caught:
            _check_stops(SamplingParams(stop_token_ids=ids, min_tokens=1), size=size, ends={0, 1})
        assert caught.value.parameter == "stop_token_ids"


def test_texts_are_cut_as_transformers_cuts_them_or_the_parameter_is_refused(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    vocabulary = ModelVocabulary(transformers.AutoTokenizer.from_pretrained(make_encoder(tmp_path / "tiny")), 120)
    whole = vocabulary.encode_text("the small model", None)
    assert vocabulary.encode_text("the small model", 3) == [*whole[:2], whole[-1]]
    for most in (1, 2):
        with pytest.raises(InvalidParameter) as caught:
            vocabulary.encode_text("the small model", most)
        assert caught.value.parameter == "truncate_tokens"


def test_an_embedding_that_its_dead_engine_refuses_is_left_to_go_on_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker is about to end: then its controllers give the request to another."""
    worker = VLLMWorker(WorkerConfig(model="m"))
    loaded = SimpleNamespace(
        engine=SimpleNamespace(errored=True),
        tokenizing=None,
        figures=EngineFigures(),
        outputs=(),
        loras={},
        vocabulary=None,
        context_length=8,
    )

    async def failing(*_: object) -> None:
        raise RuntimeError("engine dead")

    monkeypatch.setattr(worker, "_loaded_parts", loaded)
    monkeypatch.setattr(vllm_worker, "_encode_texts", lambda *_: [[1]])
    monkeypatch.setattr(vllm_worker, "embed", failing)

    async def ask() -> None:
        task = asyncio.create_task(worker.embed(Embed(1, "m", texts=["a"])))
        done, _ = await asyncio.wait([task], timeout=0.2)
        assert not done
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(ask())


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


def stand_in(monkeypatch: pytest.MonkeyPatch, **modules: dict[str, Any]) -> None:
    """Modules of vLLM that hold only what is given; dots in their names are written as two underscores."""
    for name, content in modules.items():
        path = name.replace("__", ".")
        for place in range(len(parts := path.split("."))):
            monkeypatch.setitem(sys.modules, whole := ".".join(parts[: place + 1]), ModuleType(whole))
        sys.modules[path].__dict__.update(content)


class Refusal(ValueError):
    """As vLLM's VLLMValidationError."""

    def __init__(self, message: str, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


BAD_EXPRESSION = """Grammar error: at 1(8): invalid regex "([" (in regex): regex parse error:
    ([
     ^
error: unclosed character class
   1 | start: /([/
              ^
"""


@pytest.mark.parametrize(
    ("error", "guided", "parameter", "message"),
    [
        (Refusal(BAD_EXPRESSION), Guided(regex="(["), "guided.regex", "guided.regex cannot be followed: unclosed character class"),
        (
            Refusal("Grammar error: type must be a string or array of strings"),
            Guided(json='{"type": 3}'),
            "guided.json",
            "guided.json cannot be followed: type must be a string or array of strings",
        ),
        (
            Refusal('Grammar error: at 1(8): unknown name: "x"\n   1 | start: x\n              ^\n'),
            Guided(grammar="start: x"),
            "guided.grammar",
            'guided.grammar cannot be followed: unknown name: "x"',
        ),
        (Refusal("too many", "logprobs"), Guided(choice=["a"]), "logprobs", "vLLM refuses the request: too many"),
        (ValueError("two\n  lines"), None, "params", "vLLM refuses the request: two lines"),
    ],
    ids=["expression", "schema", "grammar", "another parameter", "no form"],
)
def test_what_vllm_says_of_a_request_is_one_sentence_that_names_its_parameter(
    monkeypatch: pytest.MonkeyPatch, error: Exception, guided: Guided | None, parameter: str, message: str
) -> None:
    stand_in(monkeypatch, vllm__exceptions={"VLLMValidationError": Refusal})
    found = refused(error, guided)
    assert isinstance(found, InvalidParameter)
    assert (found.parameter, found.message) == (parameter, message)


def test_what_is_no_mistake_of_the_request_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, vllm__exceptions={"VLLMValidationError": Refusal})
    for error in (RuntimeError("the engine"), InvalidParameter("ours")):
        assert refused(error, Guided(choice=["a"])) is error


@pytest.mark.parametrize("traced", [False, True])
def test_the_engine_gets_the_defaults_of_a_server(monkeypatch: pytest.MonkeyPatch, traced: bool) -> None:
    """vLLM's for an engine inside a program let fewer sequences and tokens into a step, and slots follow `max_num_seqs`.

    Its process counts what heartbeats tell; its front end counts for traces only.
    """
    figures = EngineFigures()
    arguments = SimpleNamespace(disable_log_stats=False, create_engine_config=lambda usage: f"settings of a {usage}")
    made = SimpleNamespace(
        logger_manager=object(), log_stats=True, output_processor=SimpleNamespace(log_stats=True, tracing_enabled=traced)
    )
    asked: list[tuple[str, bool]] = []

    def from_vllm_config(config: str, *, disable_log_stats: bool) -> Any:
        asked.append((config, disable_log_stats))
        return made

    stand_in(
        monkeypatch,
        vllm__engine__arg_utils={"AsyncEngineArgs": None},
        vllm__usage__usage_lib={"UsageContext": SimpleNamespace(OPENAI_API_SERVER="server", ENGINE_CONTEXT="program")},
        vllm__v1__engine__core={"EngineCoreProc": SimpleNamespace(run_engine_core=None)},
        vllm__v1__engine__async_llm={"AsyncLLM": SimpleNamespace(from_vllm_config=from_vllm_config)},
    )
    monkeypatch.setattr(vllm_engine, "parsed", lambda *_: arguments)
    assert vllm_engine.start("m", {}, {}, figures) is made
    assert asked == [("settings of a server", False)]
    assert made.logger_manager is figures
    assert (made.log_stats, made.output_processor.log_stats) == (traced, traced)


def test_a_schema_that_would_keep_the_engine_busy_for_minutes_does_not_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {"RequestOutputKind": SimpleNamespace(DELTA=0), "StructuredOutputsParams": SimpleNamespace, "SamplingParams": SimpleNamespace}
    stand_in(monkeypatch, vllm__sampling_params=kinds, vllm__exceptions={"VLLMValidationError": Refusal})
    small, large = (Guided(json=json.dumps({"type": "integer", "multipleOf": number})) for number in (3, 1000003))
    assert sampling(SamplingParams(guided=small), 9).structured_outputs.json == small.json
    with pytest.raises(InvalidParameter, match="each remainder") as caught:
        sampling(SamplingParams(guided=large), 9)
    assert caught.value.parameter == "guided.json"
