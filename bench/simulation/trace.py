"""Messages in words, for a trace."""

from __future__ import annotations

import msgspec

from zmqserve import messages as m

_HEADS = (
    ("READY", "LOAD", "BUSY", "DRAINING", "BYE", "FIRST", "MORE", "DONE", "FAILED"),
    ("WELCOME", "REFUSED", "REQUEST", "CANCEL", "BEAT", "REREGISTER", "DRAIN"),
)
_KINDS = {getattr(m, name): name for names in _HEADS for name in names}
_UNTAGGED = {m.READY, m.LOAD, m.WELCOME, m.REFUSED}
"""Their payloads have no tag."""
_TAGS = {
    kind.__struct_config__.tag: kind.__name__
    for kind in vars(m).values()
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct) and isinstance(kind.__struct_config__.tag, int)
} | {36: "Chunk"}
WIDTH = 160


def describe(frames: tuple[bytes, ...]) -> str:
    """Heads by kind, payloads by tag, and their fields, shortened."""
    fields = [_decoded(frame) for frame in frames if frame]
    words = [_named(entry, _KINDS if len(frames) > 1 and place == 0 else _TAGS) for place, entry in enumerate(fields)]
    if len(fields) > 1 and isinstance(fields[0], list) and fields[0][0] in _UNTAGGED:
        words[1] = repr(fields[1])
    return " | ".join(text if len(text) <= WIDTH else text[: WIDTH - 3] + "..." for text in words)


def _decoded(frame: bytes) -> object:
    try:
        return msgspec.msgpack.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return frame.hex()


def _named(fields: object, names: dict[int, str]) -> str:
    if isinstance(fields, list) and fields and isinstance(fields[0], int):
        return f"{names.get(fields[0], fields[0])} {', '.join(map(_field, fields[1:]))}"
    return repr(fields)


def _field(value: object) -> str:
    if isinstance(value, int) and value > 2**32:
        return f"#{value & 0xFFFF:04x}"
    return repr(value)
