"""CURVE keys in files, in pyzmq's format: NAME.key holds a public key, NAME.key_secret the pair."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import struct
from collections.abc import Callable
from errno import ELOOP
from pathlib import Path
from typing import NamedTuple

import zmq
from zmq.utils import z85

from .errors import InvalidParameter

PUBLIC_SUFFIX, SECRET_SUFFIX = ".key", ".key_secret"
NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
"""What a key may be called."""
NAMED = re.compile(NAME.pattern + re.escape(PUBLIC_SUFFIX))
"""What its file is called then."""
MAX_BYTES = 64 * 2**10
"""Of a file with a key: it is a few hundred, and a larger one is something else."""

_FIELD = re.compile(r"^[ \t]*(public|secret)-key[ \t]*=[ \t]*[\"']([^\"'\r\n]*)[\"'][ \t]*$", re.MULTILINE)
_HEAD = """\
# ZeroMQ CURVE {kind} certificate of {name}.
# {advice}

metadata
curve
"""
_ADVICE = {
    "public": "It may be read by anybody; who allows a key must know whose it is.",
    "secret": "Whoever reads this file can be taken for its owner: keep it at mode 0600, and give it to nobody.",
}


class Unreadable(Exception):
    """A file that is no certificate, or none that may be used. Its text says why and what to do; `passes` whether it may be different in a
    moment, because what failed was this process or the disk."""

    def __init__(self, text: str, *, passes: bool = False) -> None:
        super().__init__(text)
        self.passes = passes


class Pair(NamedTuple):
    """Both keys, as z85 text. Its repr shows the public one only."""

    public: bytes
    secret: bytes

    def __repr__(self) -> str:
        return f"Pair({fingerprint(self.public.decode())})"


def fingerprint(key: str) -> str:
    """A public key's, in 64 hex digits. People compare the first eight."""
    return hashlib.sha256(z85.decode(key.encode())).hexdigest()


def checked_name(name: str) -> str:
    """The name, if a key may be called so. Raises InvalidParameter."""
    if NAME.fullmatch(name) is None:
        text = f"a key's name has 1 to 64 of the characters A-Z a-z 0-9 . _ - and does not begin with a dot, got {name!r}"
        raise InvalidParameter(text, data={"parameter": "name"})
    return name


def read_public(path: Path) -> str:
    """The public key in a file of public keys, as z85 text. Raises Unreadable, also when others than its owner may change the file."""
    return public_key(path, *read_text(path))


def public_key(path: Path, text: str, state: os.stat_result) -> str:
    """The same, of what `read_text` has read there."""
    fields = _fields(path, text)
    if "secret" in fields:
        raise Unreadable(f"{path} holds a secret key, which belongs to its owner alone: give the file that ends in {PUBLIC_SUFFIX}")
    check_unforgeable(path, state)
    return _key(path, fields, "public").decode()


def public_keys(text: str) -> set[str]:
    """What the text of a file calls public keys, whatever else is wrong with it."""
    return {key for which, key in _FIELD.findall(text) if which == "public"}


def read_pair(path: Path) -> Pair:
    """The pair in a secret file. Raises Unreadable, also when others may read the file than its owner, or a group that root gave it to."""
    return secret_pair(path, *read_text(path))


def secret_pair(path: Path, text: str, state: os.stat_result) -> Pair:
    """The same, of what `read_text` has read there."""
    fields = _fields(path, text)
    if "public" in fields and "secret" not in fields:
        raise Unreadable(f"{path} holds a public key only: give the file of the pair, which ends in {SECRET_SUFFIX}")
    _check_secret(path, state)
    pair = Pair(_key(path, fields, "public"), _key(path, fields, "secret"))
    if zmq.curve_public(pair.secret) != pair.public:
        raise Unreadable(f"{path}: the public key is not that of the secret one; make a new pair with `zmqserve keys new`")
    return pair


def write_pair(folder: Path, name: str) -> Pair:
    """Make a pair and both its files, in a folder that is there. Raises InvalidParameter, also where one of the files exists."""
    public, secret = zmq.curve_keypair()
    pair = Pair(public, secret)
    path = folder / checked_name(name)
    write_new(path.with_name(name + SECRET_SUFFIX), _text("secret", name, pair), 0o600)
    try:
        write_public(path.with_name(name + PUBLIC_SUFFIX), name, public.decode())
    except BaseException:
        path.with_name(name + SECRET_SUFFIX).unlink()
        raise
    return pair


def write_public(path: Path, name: str, key: str) -> None:
    """Make the file of a public key. Raises InvalidParameter, also where it exists."""
    write_new(path, _text("public", name, Pair(key.encode(), b"")), 0o644)


def write_new(path: Path, text: str, mode: int) -> None:
    """A new file, never with a wider mode. Raises InvalidParameter, also where it exists."""
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    except FileExistsError:
        raise InvalidParameter(f"{path} exists, and keys are never overwritten: choose another name", data={"parameter": "name"}) from None
    except OSError as error:
        raise InvalidParameter(f"cannot write {path}: {error.strerror or error}", data={"parameter": "name"}) from None
    try:
        with os.fdopen(file, "wb") as out:
            out.write(text.encode())
    except OSError as error:
        path.unlink()
        raise InvalidParameter(f"cannot write {path}: {error.strerror or error}", data={"parameter": "name"}) from None


def _opened(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe without a writer would make the opening wait


def read_text(path: Path, opened: Callable[[Path], int] = _opened) -> tuple[str, os.stat_result]:
    """A small file of text, and the state of what was read: of the file itself, where a symbolic link led to it. `opened` follows the
    links and gives a descriptor. Raises Unreadable."""
    try:
        try:
            file = opened(path)
        except (FileNotFoundError, BlockingIOError):
            # Mounted keys are replaced by a link to another folder, and the old folder goes at once: who was on the way in it tries again.
            file = opened(path)
        try:
            state = os.fstat(file)
            if not stat.S_ISREG(state.st_mode):
                raise Unreadable(f"{path} is not a file")
            raw = os.read(file, MAX_BYTES + 1)
        finally:
            os.close(file)
    except OSError as error:
        gone = isinstance(error, FileNotFoundError | NotADirectoryError | PermissionError) or error.errno == ELOOP
        raise Unreadable(f"cannot read {path}: {error.strerror or error}", passes=not gone) from None
    if len(raw) > MAX_BYTES:
        raise Unreadable(f"{path} is larger than {MAX_BYTES} bytes")
    try:
        return raw.decode(), state
    except UnicodeDecodeError:
        raise Unreadable(f"{path} is not text") from None


def check_unforgeable(path: Path | str, state: os.stat_result) -> None:
    """Raise Unreadable for a file or folder that somebody else might change: whoever can may let himself in.

    A folder with the sticky bit may be written to by others, as those that Kubernetes mounts: they can neither remove nor replace what is
    not theirs, and what they add is theirs, so not used.
    """
    if state.st_uid not in (os.geteuid(), 0):
        raise Unreadable(f"{path} belongs to user {state.st_uid}, who may change it: chown {os.geteuid()} {path}")
    sticky = stat.S_ISDIR(state.st_mode) and state.st_mode & stat.S_ISVTX
    if state.st_mode & 0o022 and not sticky:
        raise Unreadable(f"{path} may be written by others (mode {stat.S_IMODE(state.st_mode):04o}): chmod go-w {path}")


def _check_secret(path: Path, state: os.stat_result) -> None:
    """PostgreSQL's rule for its key files: mode 0600 or less, or 0640 or less where it is root's, who gives it to a group on purpose."""
    if state.st_uid not in (os.geteuid(), 0):
        raise Unreadable(f"{path} belongs to user {state.st_uid}, not to this process's {os.geteuid()}: chown {os.geteuid()} {path}")
    if state.st_mode & (0o077 if state.st_uid else 0o037):
        raise Unreadable(f"{path} may be used by others (mode {stat.S_IMODE(state.st_mode):04o}): chmod 600 {path}")


def _fields(path: Path, text: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    for which, key in _FIELD.findall(text):
        if which in fields:
            raise Unreadable(f"{path} has more than one {which} key")
        fields[which] = key
    return fields


def _key(path: Path, fields: dict[str, str], which: str) -> bytes:
    """One of its keys, in the only form that stands for its 32 bytes."""
    if which not in fields:
        raise Unreadable(f'{path} holds no {which} key: a line like {which}-key = "...", as `zmqserve keys new` writes it')
    try:
        raw = z85.decode(fields[which].encode())
    except (ValueError, KeyError, struct.error):
        raw = b""
    if len(raw) != 32 or not any(raw):
        raise Unreadable(f"{path}: its {which} key is not one: 40 characters of z85 text are")
    return z85.encode(raw)


def _text(kind: str, name: str, pair: Pair) -> str:
    lines = _HEAD.format(kind=kind, name=name, advice=_ADVICE[kind]) + f'    public-key = "{pair.public.decode()}"\n'
    return lines + (f'    secret-key = "{pair.secret.decode()}"\n' if kind == "secret" else "")
