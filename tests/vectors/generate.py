"""Writes the golden bytes of protocol 1: run ``python -m tests.vectors.generate`` when a message was ADDED to `EXAMPLES`, and only then.

What v1.json holds already is never rewritten: the script stops when an example no longer encodes to its bytes, because every
client, worker and controller out there would stop understanding it. A new field with a default goes into a new example; a map that
is written whole (status) gains the new name in the old ones, too, which keep the bytes that they had.

v1.json is meant for implementers in other languages, too: `hex` is the message, `fields` its content by name (bytes as hex), and
`short`, where present, the shortest array that means the same, with the trailing defaults left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec import NODEFAULT, Struct

from zmqserve import messages as m
from zmqserve.params import EmbedParams, Guided, SamplingParams

FILE = Path(__file__).with_name("v1.json")
EPOCH, CLIENT, RID = 0x0123456789ABCDEF, 7, 0x1122334455667788

_USAGE = m.Usage(prompt_tokens=3, completion_tokens=2)
_TIMINGS = m.Timings(worker="echo-1", queue_ms=0.25, first_ms=1.5, total_ms=12.0)
_LOGPROB = m.TokenLogprob(5, " b", -0.5, [m.TopLogprob(5, " b", -0.5), m.TopLogprob(6, " é", -1.25)])
_CHUNK = m.Chunk(RID, 3, 0, " b", m.pack_ids([1]))
_CARD = m.ModelCard(
    name="smollm2-135m",
    fingerprint="9f86d081884c7d65",
    context_length=8192,
    verbs=["generate", "chat", "embed", "count_tokens", "model_details"],
    features=["resume", "logprobs"],
    aliases=["small"],
    embedding_dim=576,
    source="HuggingFaceTB/SmolLM2-135M-Instruct",
)
_LIMITS = m.Limits(message_bytes=67_108_864, queue_requests=1000, queue_bytes=268_435_456, default_deadline_ms=600_000, ttl_ms=3000)
_WORKER = m.WorkerStatus(
    name="echo-1",
    backend="echo",
    state="ready",
    models=["m"],
    slots=8,
    running=3,
    others=1,
    free=4,
    speed=2.5,
    waiting=1,
    step_age_ms=12.5,
    heard_ms=250.0,
    up_s=60.0,
    finished=1000,
    version="0.1.0",
)
_MODEL = m.ModelStatus(card=_CARD, state="ready", workers=["echo-1"], running=3, waiting=2, waiting_bytes=4096, slots=8)
_PARAMS = SamplingParams(
    max_tokens=16,
    min_tokens=1,
    temperature=0.5,
    top_p=0.75,
    top_k=40,
    min_p=0.125,
    presence_penalty=0.5,
    frequency_penalty=-0.5,
    repetition_penalty=1.25,
    stop=["\n\n"],
    stop_token_ids=[2],
    seed=42,
    n=2,
    logprobs=2,
    echo=True,
    ignore_eos=True,
    skip_special_tokens=False,
    guided=Guided(choice=["yes", "no"]),
)
_ROUTED: dict[str, Any] = {
    "priority": -1,
    "deadline_ms": 30_000,
    "affinity": "session-1",
    "attempts": 1,
    "fingerprint": "9f86d081884c7d65",
    "trace": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
}


class Example(NamedTuple):
    """A named message; two of each type at least, one with defaults only and one with all that it can say."""

    name: str
    value: Struct


EXAMPLES = [
    # client -> controller
    Example("hello-minimal", m.Hello(1)),
    Example("hello-full", m.Hello(1, client="notebook")),
    Example("generate-minimal", m.Generate(1, "m")),
    Example("generate-prompt", m.Generate(RID, "m", prompt="a b c", params=SamplingParams(max_tokens=5))),
    Example("generate-not-streamed", m.Generate(RID, "m", stream=False, prompt="a b c", params=SamplingParams(max_tokens=5))),
    Example("generate-messages", m.Generate(2, "m", messages=[m.ChatMessage("system", "Be brief."), m.ChatMessage("user", "Hi 👋")])),
    Example(
        "generate-full",
        m.Generate(
            m.MAX_RID,
            "smollm2-135m",
            **_ROUTED,
            stream=True,
            token_ids=m.pack_ids([1, 2, 65536]),
            params=_PARAMS,
            resume=m.Resume(m.pack_ids([7, 8]), characters=6, next_seq=2, prompt_token_ids=m.pack_ids([1, 2, 65536])),
            extra={"image": msgspec.Raw(b"\xc4\x01\xff")},
        ),
    ),
    Example("embed-minimal", m.Embed(1, "m")),
    Example(
        "embed-full",
        m.Embed(
            RID,
            "minilm",
            **_ROUTED,
            texts=["a", "ünïcode"],
            params=EmbedParams(dimensions=128, normalize=True, truncate_tokens=512),
            extra={"task": msgspec.Raw(b"\xa5query")},
        ),
    ),
    Example("count-tokens-minimal", m.CountTokens(1, "m")),
    Example("count-tokens-prompt", m.CountTokens(RID, "m", **_ROUTED, prompt="a b c")),
    Example("count-tokens-full", m.CountTokens(RID, "m", **_ROUTED, messages=[m.ChatMessage("user", "Hi")])),
    Example("model-details-minimal", m.ModelDetails(1, "m")),
    Example("model-details-full", m.ModelDetails(RID, "m", **_ROUTED)),
    Example("list-models", m.ListModels(1)),
    Example("list-models-large-rid", m.ListModels(RID)),
    Example("status", m.Status(1)),
    Example("status-large-rid", m.Status(RID)),
    Example("drain-minimal", m.Drain(1, "echo-1")),
    Example("drain-full", m.Drain(RID, "echo-1", grace_ms=30_000)),
    Example("cancel", m.Cancel(1)),
    Example("cancel-large-rid", m.Cancel(RID)),
    Example("ping-minimal", m.Ping(3000)),
    Example("ping-full", m.Ping(3000, rids=[1, RID])),
    # controller -> client
    Example("welcome-minimal", m.Welcome(1, "c0ffee", m.Limits())),
    Example("welcome-full", m.Welcome(1, "c0ffee", _LIMITS, version="0.1.0")),
    Example("pong-minimal", m.Pong("c0ffee")),
    Example("pong-full", m.Pong("c0ffee", unknown=[RID])),
    Example("go-away-minimal", m.GoAway("")),
    Example("go-away-full", m.GoAway("the controller is shutting down")),
    Example("chunk-minimal", m.Chunk(1, 0, 0, "", b"")),
    Example("chunk-text", _CHUNK),
    Example("chunk-full", m.Chunk(RID, 3, 1, " b", m.pack_ids([5]), logprobs=[_LOGPROB])),
    Example("first-chunk", m.FirstChunk(RID, 0, 0, "a", m.pack_ids([0]), fingerprint="9f86d081884c7d65")),
    Example("first-chunk-minimal", m.FirstChunk(1, 0, 0, "", b"")),
    Example("chunks-minimal", m.Chunks([])),
    Example("chunks-full", m.Chunks([_CHUNK, m.Chunk(1, 0, 0, "a", m.pack_ids([0]), logprobs=[m.TokenLogprob(0, "a", 0.0)])])),
    Example("done-minimal", m.Done(1, 0, [], m.Usage(0, 0), m.Timings(""))),
    Example("done-full", m.Done(RID, 3, ["stop", "length"], m.Usage(3, 2, cached_tokens=1), _TIMINGS, last=_CHUNK)),
    Example("reply-minimal", m.Reply(1, [], m.Usage(0, 0), m.Timings(""))),
    Example("reply-text", m.Reply(RID, [m.Choice("a b", m.pack_ids([0, 1]), "length")], _USAGE, _TIMINGS)),
    Example("reply-full", m.Reply(RID, [m.Choice(" b", m.pack_ids([5]), "stop", logprobs=[_LOGPROB])], _USAGE, _TIMINGS)),
    Example("embedding-minimal", m.Embedding(1, "float32", (0, 0), b"", m.Usage(0, 0), m.Timings(""))),
    Example("embedding-full", m.Embedding(RID, "float32", (1, 2), bytes.fromhex("0000803f000000bf"), _USAGE, _TIMINGS)),
    Example("tokens-minimal", m.Tokens(1, 3)),
    Example("tokens-full", m.Tokens(RID, 3, context_length=8192)),
    Example("details-minimal", m.Details(1, m.ModelCard("m"))),
    Example("details-full", m.Details(RID, _CARD)),
    Example("models-minimal", m.Models(1, [])),
    Example("models-full", m.Models(RID, [_MODEL])),
    Example(
        "status-reply-minimal",
        m.StatusReply(
            1,
            m.ControllerStatus(
                controller="c0ffee",
                version="0.1.0",
                protocol=1,
                dispatch="shortest_queue",
                up_s=0.0,
                client_endpoints=[],
                worker_endpoints=[],
                workers=[],
                models=[],
            ),
        ),
    ),
    Example(
        "status-reply-full",
        m.StatusReply(
            RID,
            m.ControllerStatus(
                controller="c0ffee",
                version="0.1.0",
                protocol=1,
                dispatch="lottery",
                up_s=3600.5,
                client_endpoints=["tcp://127.0.0.1:5570"],
                worker_endpoints=["tcp://127.0.0.1:5571", "ipc:///run/zmqserve/workers.ipc"],
                workers=[_WORKER],
                models=[_MODEL],
                clients=2,
                running=3,
                waiting=2,
                outbox_bytes=512,
                counters={"requests": 1005, "stale": 1},
            ),
        ),
    ),
    Example("drain-reply", m.DrainReply(1, "echo-1", 0)),
    Example("drain-reply-busy", m.DrainReply(RID, "echo-1", 3)),
    Example("error-minimal", m.Error(0, 40001, "")),
    Example(
        "error-full",
        m.Error(
            RID,
            42903,
            "the queue of m is full",
            retryable=True,
            retry_after_ms=500,
            data={"model": "m", "waiting": 1000, "share": 0.5, "known_models": ["m"]},
        ),
    ),
    # cards, on their own
    Example("model-card-minimal", m.ModelCard("m")),
    Example("model-card-resume", m.ModelCard("m", features=["resume"], resume={"n": "refused", "sampling": "approximate"})),
    Example("model-card-full", _CARD),
    Example("model-card-slots", m.ModelCard("m", slots=2)),
    Example("limits-minimal", m.Limits()),
    Example("limits-full", _LIMITS),
    Example("worker-status-child", m.WorkerStatus("below", "controller", "ready", ["m"], 8, 3, controllers=["c0ffee", "feed"])),
    Example("worker-status-minimal", m.WorkerStatus("echo-1", "echo", "loading", [], 0, 0)),
    Example("worker-status-full", _WORKER),
    Example("model-status-minimal", m.ModelStatus(m.ModelCard("m"), "loading", [])),
    Example("model-status-full", _MODEL),
    Example("sampling-params-minimal", SamplingParams()),
    Example("sampling-params-full", _PARAMS),
    Example("embed-params-minimal", EmbedParams()),
    Example("embed-params-full", EmbedParams(dimensions=128, normalize=True, truncate_tokens=512)),
    Example("guided-json", Guided(json='{"type":"object"}')),
    Example("guided-regex", Guided(regex="[ab]+")),
    Example("guided-choice", Guided(choice=["yes", "no"])),
    Example("guided-grammar", Guided(grammar='root ::= "a"')),
    # worker -> controller: heads, then payloads
    Example("head-ready-first", m.WorkerHead(m.READY, 0)),
    Example("head-ready", m.WorkerHead(m.READY, EPOCH)),
    Example("head-load", m.WorkerHead(m.LOAD, EPOCH)),
    Example("head-busy", m.WorkerHead(m.BUSY, EPOCH, client=CLIENT, rid=RID)),
    Example("head-draining", m.WorkerHead(m.DRAINING, EPOCH)),
    Example("head-bye", m.WorkerHead(m.BYE, EPOCH)),
    Example("head-first", m.WorkerHead(m.FIRST, EPOCH, client=CLIENT, rid=RID)),
    Example("head-more-not-canonical", m.WorkerHead(m.MORE, EPOCH, client=CLIENT)),
    Example("head-done", m.WorkerHead(m.DONE, EPOCH, CLIENT, RID, outcome="length", prompt_tokens=3, completion_tokens=2)),
    Example("head-failed", m.WorkerHead(m.FAILED, EPOCH, CLIENT, RID, code=50001, prompt_tokens=3)),
    Example("ready-minimal", m.Ready(1, "echo-1", "echo", "loading", [], 0, 1.0, 3000)),
    Example("ready-full", m.Ready(1, "echo-1", "echo", "ready", [_CARD], 8, 2.5, 3000, controllers=["c0ffee"], version="0.1.0")),
    Example("load-minimal", m.Load(0, 0, 0)),
    Example("load-full", m.Load(3, 1, 2, step_age_ms=12.5)),
    # controller -> worker: heads, then payloads
    Example("head-welcome", m.ControllerHead(m.WELCOME, EPOCH)),
    Example("head-refused", m.ControllerHead(m.REFUSED, 0)),
    Example("head-request-minimal", m.ControllerHead(m.REQUEST, EPOCH, client=CLIENT, rid=RID)),
    Example("head-request-full", m.ControllerHead(m.REQUEST, EPOCH, CLIENT, RID, deadline_ms=29_998, attempts=1, queue_ms=2.5)),
    Example("head-cancel", m.ControllerHead(m.CANCEL, EPOCH, client=CLIENT, rid=RID)),
    Example("head-beat", m.ControllerHead(m.BEAT, EPOCH)),
    Example("head-reregister", m.ControllerHead(m.REREGISTER, 0)),
    Example("head-drain", m.ControllerHead(m.DRAIN, EPOCH, deadline_ms=30_000)),
    Example("worker-welcome-minimal", m.WorkerWelcome(1, "c0ffee", 3000)),
    Example("worker-welcome-full", m.WorkerWelcome(1, "c0ffee", 3000, version="0.1.0", message_bytes=67_108_864)),
    Example("refused-minimal", m.Refused(40003, "")),
    Example("refused-full", m.Refused(40103, "a worker named echo-1 is registered", retry_after_ms=1000)),
]

MORE_HEADS = [(EPOCH, CLIENT), (EPOCH, 127), (EPOCH, 128), (EPOCH, 65_536), (1, 2**32), (m.MAX_RID, m.MAX_RID)]
"""(epoch, client) of canonical MORE heads, one for each width of an integer."""


def fields(value: object) -> Any:
    """The value for JSON: messages as maps by field name, bytes as hex."""
    if isinstance(value, Struct):
        return {name: fields(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, bytes | msgspec.Raw):
        return bytes(value).hex()
    if isinstance(value, dict):
        return {key: fields(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [fields(item) for item in value]
    return value


def says(known: Any, now: Any) -> bool:
    """Whether what was known is still said: maps may have gained names."""
    if isinstance(known, dict) and isinstance(now, dict):
        return all(name in now and says(value, now[name]) for name, value in known.items())
    if isinstance(known, list) and isinstance(now, list):
        return len(known) == len(now) and all(map(says, known, now))
    return bool(known == now)


def same(golden: dict[str, Any], entry: dict[str, Any]) -> bool:
    """Whether an example still has its golden bytes, but for names that maps have gained."""
    now = {"hex": _plain(entry["hex"]), "short": _plain(entry.get("short")), "fields": entry["fields"]}
    return says({"hex": _plain(golden["hex"]), "short": _plain(golden.get("short")), "fields": golden["fields"]}, now)


def _plain(data: str | None) -> Any:
    return None if data is None else msgspec.msgpack.decode(bytes.fromhex(data))


def short(value: Struct) -> bytes | None:
    """The shortest encoding: an array without its trailing defaults; None where that is the usual one."""
    if not value.__struct_config__.array_like:
        return None
    values = [getattr(value, name) for name in value.__struct_fields__]
    defaults = (NODEFAULT,) * (len(values) - len(value.__struct_defaults__)) + value.__struct_defaults__
    plain = [default.factory() if hasattr(default, "factory") else default for default in defaults]
    while values and values[-1] == plain[-1]:
        values.pop()
        plain.pop()
    tag = value.__struct_config__.tag
    encoded = m.encode(values if tag is None else [tag, *values])
    return encoded if encoded != m.encode(value) else None


def vector(example: Example) -> dict[str, Any]:
    """One entry of v1.json."""
    entry = {"name": example.name, "type": type(example.value).__name__, "hex": m.encode(example.value).hex()}
    shortest = short(example.value)
    if shortest is not None:
        entry["short"] = shortest.hex()
    return entry | {"fields": fields(example.value)}


def main() -> None:
    """Add what is missing to v1.json, or stop at the first example whose bytes changed."""
    known = {entry["name"]: entry for entry in json.loads(FILE.read_text())["messages"]} if FILE.exists() else {}
    for example in EXAMPLES:
        entry = vector(example)
        if not same(known.setdefault(example.name, entry), entry):
            raise SystemExit(f"{example.name} no longer encodes to its golden bytes: the protocol's messages never change")
    more = [{"epoch": epoch, "client": client, "hex": m.more_head(epoch, client).hex()} for epoch, client in MORE_HEADS]
    document = {"protocol": m.PROTOCOL, "more_heads": more, "messages": [known[example.name] for example in EXAMPLES]}
    FILE.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    print(f"{FILE.name}: {len(known)} messages")


if __name__ == "__main__":
    main()
