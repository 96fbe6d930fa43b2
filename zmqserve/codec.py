"""Messages to bytes and back, with errors that name the field. What the messages are stands in messages.py."""

from __future__ import annotations

import re
import struct
import sys
from array import array
from collections.abc import Iterable
from typing import Any, TypeVar

import msgspec

from .errors import InvalidParameter, MalformedMessage, RequestError


class _Tag(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The first element of any client-side message."""

    tag: int


T = TypeVar("T")
_one_id = struct.Struct("<I").unpack
_tag = msgspec.msgpack.Decoder(_Tag)
_encoder = msgspec.msgpack.Encoder()
encode = _encoder.encode
"""Encode any message, head or payload: ``encode(message) -> bytes``."""


def decoder(kind: Any) -> msgspec.msgpack.Decoder[Any]:
    """A decoder for one of this module's types or unions; see `read` for the errors."""
    return msgspec.msgpack.Decoder(kind)


def read(using: msgspec.msgpack.Decoder[T], data: bytes) -> T:
    """Decode, or raise MalformedMessage (InvalidParameter for `params`) that names the field. Hostile nesting is one more error."""
    try:
        return using.decode(data)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise _explain(error, using, data) from None


def tag_of(data: bytes) -> int | None:
    """Which client-side message it is by its first element, in whatever form of msgpack; None where there is none."""
    try:
        return _tag.decode(data).tag
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _explain(error: Exception, using: msgspec.msgpack.Decoder[Any], data: bytes) -> RequestError:
    """msgspec names array elements by position (``$[2]``); say the message's and the field's name instead."""
    if isinstance(error.__cause__, RequestError):
        return error.__cause__
    text = "nested too deeply" if isinstance(error, RecursionError) else str(error)
    kinds = getattr(using.type, "__args__", (using.type,))
    position = re.search(r" - at (?:`key` in )?`\$\[(\d+)\](.*?)`", text)
    tag = tag_of(data)
    kind = kinds[0] if len(kinds) == 1 else next((k for k in kinds if k.__struct_config__.tag == tag), None)
    if kind is None:
        if tag is not None and position is not None and position[1] == "0":
            return MalformedMessage(f"unknown message tag {tag}", data={"tag": tag})
        return MalformedMessage(text)
    fields = kind.__struct_fields__
    index = int(position[1]) - (kind.__struct_config__.tag is not None) if position else -1
    if position is None or not 0 <= index < len(fields):
        return MalformedMessage(f"{kind.__name__}: {text}")
    unknown = re.search(r"unknown field `(.+?)`", text)
    if unknown:
        name = unknown[1]
        return InvalidParameter(f"{name!r} is not a parameter of {kind.__name__} here", data={"parameter": name})
    text = text[: position.start()]
    if fields[index] == "params":
        inside = position[2].removeprefix(".") or "params"
        return InvalidParameter(f"{inside}: {text}", data={"parameter": re.split(r"\W", inside)[0]})
    return MalformedMessage(f"{kind.__name__}.{fields[index]}{position[2]}: {text}")


def pack_ids(ids: Iterable[int]) -> bytes:
    """Token ids as they travel: little-endian u32."""
    packed = array("I", ids)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_ids(data: bytes) -> list[int]:
    """The reverse of `pack_ids`; MalformedMessage when `data` is not whole u32s."""
    if len(data) == 4:
        return [*_one_id(data)]  # nearly always
    if len(data) % 4:
        raise MalformedMessage(f"token ids are u32, 4 bytes each: got {len(data)} bytes")
    ids = array("I", data)
    if sys.byteorder == "big":
        ids.byteswap()
    return ids.tolist()
