"""Forms that answers are held to: which texts they allow, what is refused, and where an answer stands in one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from zmqserve.errors import InvalidParameter, Unsupported
from zmqserve.params import Guided

from .fakes.tiny_llama import make_tokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from zmqserve.backends import guided as guided_module  # noqa: E402 - it imports torch
from zmqserve.backends.guided import Grammars, Guide  # noqa: E402 - the same

EOS = 2
SIZE = 320


def fast_tokenizer(tokenizer: Any) -> Any:
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return fast_tokenizer(make_tokenizer())


@pytest.fixture(scope="module")
def grammars(tokenizer: Any) -> Grammars:
    return Grammars(tokenizer, SIZE, {EOS})


def allowed(guide: Guide, answer: Sequence[int], size: int = SIZE) -> set[int]:
    """Ids that may come after `answer`."""
    masked, _ = guide.mask(answer, torch.zeros(1, size))
    return set((masked[0] == 0).nonzero()[:, 0].tolist())


def fits(tokenizer: Any, grammars: Grammars, guided: Guided, text: str) -> bool:
    """Whether a model could say exactly this, and end."""
    guide = Guide(grammars.compile(guided), {EOS})
    ids = tokenizer.encode(text, add_special_tokens=False)
    return all(token in allowed(guide, ids[:place]) for place, token in enumerate([*ids, EOS]))


# --- what a form means -------------------------------------------------------------------------

PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}, "required": ["name", "age"]}


@pytest.mark.parametrize(
    ("guided", "fitting", "others"),
    [
        (
            Guided(json=json.dumps(PERSON)),
            ['{"name": "Bo", "age": 3}', '{"name":"é\\n","age":-1,"more":[]}'],
            ['{"name": "Bo"}', "{}", "x"],
        ),
        (Guided(json='{"type": "integer", "multipleOf": 7}'), ["14", "0"], ["15"]),
        (Guided(json='{"enum": ["yes", 3, null]}'), ['"yes"', "3", "null"], ["yes", "4"]),
        (Guided(json="true"), ["1", "[{}]"], ["one"]),
        (Guided(regex=r"[0-9]{3}-[a-f]{2}"), ["123-ab"], ["123-ag", "123-abc", " 123-ab"]),
        (Guided(regex=r"^a+$"), ["a", "aaa"], ["^a", "b"]),
        (Guided(regex=r"\d\w\s"), ["1a ", "2_\n"], ["\u0661a ", "1é "]),
        (Guided(regex="a/b|c\nd"), ["a/b", "c\nd"], ["a", "c"]),
        (Guided(choice=["a", "ab", 'q"u\\o', "x\ny", "日本 😀"]), ["a", "ab", 'q"u\\o', "x\ny", "日本 😀"], ["b", "abc", "日"]),
        (Guided(choice=[f"no {i}" for i in range(3000)]), ["no 0", "no 2999"], ["no 3000"]),
        (Guided(grammar='root ::= "x = " number\nnumber ::= [0-9] [0-9]'), ["x = 42"], ["x = 4", "42"]),
        (Guided(grammar='root ::= ("a" root "b")?'), ["", "ab", "aabb"], ["aab"]),
        (Guided(grammar='start: /[ab]/ start | "c"'), ["c", "abac"], ["ab", "d"]),
        (Guided(grammar=r'root ::= "\u0041bc"'), ["Abc"], ["\u41bc"]),
        (Guided(grammar=r'root ::= "\U0001F600\n\u0022"'), ['😀\n"'], ["😀"]),
        (Guided(grammar=r"root ::= [a\-c\]\u002f]+"), ["a-c", "]/"], ["b"]),
        (Guided(grammar=r'root ::= "\\u0041"'), ["\\u0041"], ["A"]),
    ],
    ids=lambda value: repr(value)[:40] if isinstance(value, Guided) else "",
)
def test_a_form_allows_what_it_says_and_nothing_else(
    tokenizer: Any, grammars: Grammars, guided: Guided, fitting: list[str], others: list[str]
) -> None:
    assert [text for text in fitting if not fits(tokenizer, grammars, guided, text)] == []
    assert [text for text in others if fits(tokenizer, grammars, guided, text)] == []


def test_a_tokenizer_that_writes_spaces_and_bytes_in_its_own_way() -> None:
    """As those of sentencepiece do: a space is part of a word, and a rare character is some bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["<pad>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdefgh", "▁a", "▁b"]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [("▁", "a"), ("▁", "b")], byte_fallback=True, unk_token="<pad>"))
    made.add_special_tokens(["<pad>", "<s>", "</s>"])
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = fast_tokenizer(made)
    grammars = Grammars(tokenizer, len(words), {EOS})
    guided = Guided(choice=["ab a", "é b"])
    assert fits(tokenizer, grammars, guided, "ab a")
    assert fits(tokenizer, grammars, guided, "é b")
    assert not fits(tokenizer, grammars, guided, "aba")


def test_text_that_no_token_spells_is_the_callers_error() -> None:
    from tokenizers import Tokenizer, decoders, models

    made = Tokenizer(models.BPE({word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *"abc"])}, []))
    made.decoder = decoders.ByteLevel()
    tokenizer = fast_tokenizer(made)
    guide = Guide(Grammars(tokenizer, 6, {EOS}).compile(Guided(choice=["a1"])), {EOS})
    assert allowed(guide, [], 6) == {3}
    with pytest.raises(InvalidParameter, match=r"guided\.choice"):
        allowed(guide, [3], 6)


def test_numbers_may_be_multiples_of_small_ones_of_any_scale(grammars: Grammars) -> None:
    numbers = {"cents": 0.01, "dozens": 12, "millions": 1_000_000, "eighths": 0.125}
    properties = {name: {"type": "number", "multipleOf": number} for name, number in numbers.items()}
    grammars.compile(Guided(json=json.dumps({"type": "object", "properties": properties})))


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("guided", "why"),
    [
        (Guided(json="{"), "Expecting property name"),
        (Guided(json="[]"), "object or boolean"),
        (Guided(json='{"type": "objec"}'), "objec"),
        (Guided(json='{"type": "array", "uniqueItems": true}'), "uniqueItems"),
        (Guided(json='{"not": {"type": "string"}}'), "not"),
        (Guided(json='{"$ref": "http://127.0.0.1/schema"}'), "http://127.0.0.1/schema"),
        (Guided(json='{"$ref": "#/$defs/nowhere"}'), "nowhere"),
        (Guided(json='{"$ref": "#"}'), "no text fits it"),
        (Guided(json='{"type": "integer", "minimum": 5, "maximum": 3}'), "minimum"),
        (Guided(json='{"type":"object","properties":{"a":' * 1500 + "{}" + "}}" * 1500), "recursion"),
        (Guided(json='{"type": "integer", "multipleOf": 1000003}'), "each remainder"),
        (Guided(json='{"type": "integer", "multiple\\u004ff": 1000003}'), "each remainder"),
        (Guided(json='{"allOf": [{"type": "integer", "multipleOf": 1009}, {"multipleOf" : 10.07}]}'), "each remainder"),
        (Guided(grammar='start: %json {"type": "integer", "multipleOf": 1000003}'), "each remainder"),
        (Guided(grammar="start: A\nA: /(.{101})*/ & /(.{103})*/ & /(.{107})*/ & /(.{109})*/"), "& or ~"),
        (Guided(grammar='start: A\nA: ~"a" "b"'), "& or ~"),
        (Guided(json='{"type": "integer", "multipleOf": 1e99999999999999999999}'), "expected value"),
        (Guided(regex="("), "unclosed group"),
        (Guided(regex="(?=a)b"), "look-around"),
        (Guided(regex=r"(a)\1"), "backreferences"),
        (Guided(regex="a^b"), "lookarounds"),
        (Guided(regex="(" * 5000 + "a" + ")" * 5000), "nest"),
        (Guided(grammar="root = 3"), "::="),
        (Guided(grammar='top ::= "a"'), "root"),
        (Guided(grammar="root ::= other"), "other"),
        (Guided(grammar="root ::= root"), "no text fits it"),
        (Guided(grammar="root ::= " + "(" * 5000 + '"a"' + ")" * 5000), "recursion"),
    ],
    ids=lambda value: repr(value)[:40] if isinstance(value, Guided) else "",
)
def test_a_form_that_is_none_or_too_much_is_the_callers_error(tokenizer: Any, grammars: Grammars, guided: Guided, why: str) -> None:
    kind = next(name for name in guided.__struct_fields__ if getattr(guided, name) is not None)
    with pytest.raises(InvalidParameter) as caught:
        grammars.compile(guided)
    assert caught.value.data["parameter"] == f"guided.{kind}"
    assert caught.value.message.startswith(f"guided.{kind} ")
    assert why in caught.value.message
    assert len(caught.value.message) < 320
    assert "\n" not in caught.value.message
    assert fits(tokenizer, grammars, Guided(choice=["a"]), "a")


@pytest.mark.parametrize("kind", ["json", "regex", "grammar"])
def test_a_form_that_is_too_long_is_refused_with_both_numbers(grammars: Grammars, kind: str) -> None:
    most = guided_module.MOST_GRAMMAR_CHARACTERS if kind == "grammar" else guided_module.MOST_CHARACTERS
    with pytest.raises(InvalidParameter) as caught:
        grammars.compile(Guided(**{kind: "x" * (most + 1)}))
    assert caught.value.data["parameter"] == f"guided.{kind}"
    assert str(most) in caught.value.message
    assert str(most + 1) in caught.value.message


def test_choices_that_are_too_long_together_are_refused(grammars: Grammars) -> None:
    with pytest.raises(InvalidParameter, match=r"guided\.choice has \d+ characters"):
        grammars.compile(Guided(choice=["x" * 1000] * 70))


def test_a_form_that_grows_beyond_all_bounds_fails_with_its_name(grammars: Grammars, tokenizer: Any) -> None:
    """It is small, and each letter multiplies the places in it where an answer may stand."""
    guide = Guide(grammars.compile(Guided(regex="(([ab]{1,100}){1,100}){1,100}")), {EOS})
    ids = tokenizer.encode("abba" * 40, add_special_tokens=False)
    with pytest.raises(InvalidParameter, match="too complex") as caught:
        [guide.mask(ids[:place], torch.zeros(1, SIZE)) for place in range(len(ids))]
    assert caught.value.data["parameter"] == "guided.regex"


def test_without_the_library_the_error_names_it_and_its_extra(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(Unsupported, match=r"llguidance.*zmqserve\[transformers\]") as caught:
        Grammars(tokenizer, SIZE, {EOS}).compile(Guided(choice=["a"]))
    assert caught.value.data["parameter"] == "guided"


@pytest.mark.heavy
@pytest.mark.timeout(120)
def test_the_library_is_not_imported_before_a_model_is_loaded() -> None:
    program = "import sys, zmqserve.backends.text_generator; sys.exit('llguidance' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", program], timeout=100, check=False).returncode == 0


def test_a_model_without_an_end_cannot_be_guided(tokenizer: Any) -> None:
    with pytest.raises(Unsupported, match="ends an answer"):
        Grammars(tokenizer, SIZE, ()).compile(Guided(choice=["a"]))


def test_a_tokenizer_that_the_library_does_not_know_cannot_be_guided() -> None:
    with pytest.raises(Unsupported, match="tokenizer") as caught:
        Grammars([], SIZE, {EOS}).compile(Guided(choice=["a"]))
    assert caught.value.data["parameter"] == "guided"


def test_forms_are_compiled_once_and_the_latest_are_kept(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guided_module, "MOST_KEPT", 2)
    grammars = Grammars(tokenizer, SIZE, {EOS})
    a, b, c = (Guided(choice=[name]) for name in "abc")
    first, second = grammars.compile(a), grammars.compile(b)
    assert grammars.compile(Guided(choice=["a"])) is first
    grammars.compile(c)
    assert grammars.compile(a) is first
    assert grammars.compile(b) is not second


# --- where an answer stands --------------------------------------------------------------------


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def test_the_models_ids_beyond_the_tokenizers_never_come(grammars: Grammars, tokenizer: Any) -> None:
    size = SIZE + 64
    padded = Grammars(tokenizer, size, {EOS})
    for known in (grammars, padded):
        assert max(allowed(Guide(known.compile(Guided(regex="(?s:.)*")), {EOS}), [], size)) < SIZE


def test_a_model_with_fewer_ids_than_its_tokenizer(tokenizer: Any) -> None:
    guide = Guide(Grammars(tokenizer, SIZE - 20, {EOS}).compile(Guided(regex=".*")), {EOS})
    assert max(allowed(guide, [], SIZE - 20)) < SIZE - 20


def test_logits_stay_as_they_are(grammars: Grammars) -> None:
    logits = torch.randn(1, SIZE)
    before = logits.clone()
    masked, _ = Guide(grammars.compile(Guided(choice=["a"])), {EOS}).mask([], logits)
    assert torch.equal(logits, before)
    assert masked.dtype == logits.dtype


def test_each_end_of_the_model_may_end(tokenizer: Any) -> None:
    guide = Guide(Grammars(tokenizer, SIZE, {EOS, 1}).compile(Guided(choice=["a", "ab"])), {EOS, 1})
    answer = ids_of(tokenizer, "a")
    assert not {EOS, 1} & allowed(guide, [])
    assert {EOS, 1} < allowed(guide, answer)


def test_it_tells_when_nothing_but_the_end_may_come(grammars: Grammars, tokenizer: Any) -> None:
    guide = Guide(grammars.compile(Guided(choice=["a", "ab"])), {EOS})
    over = [guide.mask(ids_of(tokenizer, text), torch.zeros(1, SIZE))[1] for text in ("", "a", "ab")]
    assert over == [False, False, True]


def test_an_end_that_is_ignored_comes_only_when_nothing_else_may(grammars: Grammars, tokenizer: Any) -> None:
    guide = Guide(grammars.compile(Guided(choice=["a", "ab"])), {EOS}, ignore_eos=True)
    assert EOS not in allowed(guide, ids_of(tokenizer, "a"))
    assert allowed(guide, ids_of(tokenizer, "ab")) == {EOS}


def test_a_stop_id_may_come_where_the_form_is_complete(grammars: Grammars, tokenizer: Any) -> None:
    (stop,) = ids_of(tokenizer, "z")
    guide = Guide(grammars.compile(Guided(choice=["a", "ab"])), {EOS}, [stop, 4_000_000])
    assert stop not in allowed(guide, [])
    assert stop in allowed(guide, ids_of(tokenizer, "a"))
    assert allowed(guide, ids_of(tokenizer, "ab")) == {EOS, stop}


def test_an_answer_that_is_another_than_the_last_time_is_followed_anew(grammars: Grammars, tokenizer: Any) -> None:
    """A token that was chosen may get lost on its way, and another comes in its place."""
    form = grammars.compile(Guided(regex="(ab|ba)c"))
    guide = Guide(form, {EOS})
    a, b, c = (ids_of(tokenizer, letter)[0] for letter in "abc")
    for answer in ([], [a], [a, b], [a], [b], [b, a], [b, a, c], [a, b], []):
        assert allowed(guide, answer) == allowed(Guide(form, {EOS}), answer)


def test_a_text_that_must_come_may_come_in_any_tokens(grammars: Grammars, tokenizer: Any) -> None:
    """As without a form: which of them the model finds likeliest is its own matter."""
    for guided in (Guided(choice=["the dog"]), Guided(json='{"const": "the dog"}'), Guided(grammar='root ::= "the dog"')):
        answer = ids_of(tokenizer, '"') if guided.json else []
        ways = {tokenizer.decode([token]) for token in allowed(Guide(grammars.compile(guided), {EOS}), answer)}
        assert {"t", "th", "the"} <= ways
