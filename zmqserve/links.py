"""Symbolic links on the way to a controller's keys, followed one by one and judged: who can change one chooses what is read."""

from __future__ import annotations

import os
import stat
from errno import EAGAIN, ELOOP
from pathlib import Path

from .certificate import Unreadable, check_unforgeable

MOST_LINKS = 40
"""On one way, as in Linux."""

_PASS = os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NONBLOCK | _PASS  # a pipe without a writer would make the opening wait
_STEP = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | _PASS  # a folder on the way need not be readable where the system has O_PATH
_FOLDER = _STEP & ~os.O_NOFOLLOW


def opened(path: Path) -> int:
    """A descriptor of the file or folder at the end of a path, to read it. Raises Unreadable where somebody else may choose what is there,
    and OSError.

    Every link on the way must be this user's or root's, and the folder that it lies in closed to others, or sticky; so must the folder of
    what a link led to. Each step is taken from the last one's descriptor, and what is opened is no link: nothing can be exchanged between.
    """
    file, _ = _followed(str(path), "/" if path.is_absolute() else "", [], read=True)
    return file


def link_state(path: str) -> tuple[os.stat_result, list[os.stat_result]]:
    """The state of what a link leads to, and of the links and folders that are judged on the way from its own folder. Where one of them is
    refused, or it leads nowhere, the first is its own state. Of what is no link there is only that. Raises OSError."""
    try:
        own = os.lstat(path)
    except FileNotFoundError:
        own = os.lstat(path)  # the folder that it led through was replaced just then, perhaps
    met: list[os.stat_result] = []
    if stat.S_ISLNK(own.st_mode):
        where, name = os.path.split(path)
        for _ in range(2):
            met.clear()
            try:
                return _followed(name, where, met)[1], met
            except FileNotFoundError:
                continue
            except (OSError, Unreadable):
                break
    return own, met


def mark(state: os.stat_result) -> tuple[int, int, int]:
    """What is another when a link has been replaced, or a folder opened to others. Not a folder's times: any file in it changes them."""
    return state.st_ino, state.st_ctime_ns if stat.S_ISLNK(state.st_mode) else state.st_mode, state.st_uid


def _followed(path: str, where: str, met: list[os.stat_result], *, read: bool = False) -> tuple[int, os.stat_result]:
    """The end of a path from this folder: a descriptor to `read` it, or -1, and its state before. `met` gets what is judged."""
    names, linked = _names(path), False
    here = os.open(where or ".", _FOLDER)
    try:
        while True:
            name = names.pop()
            place = os.path.join(where, name) if name != ".." else os.path.normpath(os.path.join(where, name))
            state = os.lstat(name, dir_fd=here)
            if stat.S_ISLNK(state.st_mode):
                if len(met) >= 2 * MOST_LINKS:
                    raise OSError(ELOOP, os.strerror(ELOOP))
                _judge(place, state, met)
                _judge(where, os.fstat(here), met)
                target = os.readlink(name, dir_fd=here)
                if mark(os.lstat(name, dir_fd=here)) != mark(state):
                    raise BlockingIOError(EAGAIN, "a link was replaced just then")
                linked = linked or not names
                names += _names(target)
                if target.startswith("/"):
                    root = os.open("/", _FOLDER)
                    os.close(here)
                    here, where = root, "/"
                continue
            if linked and not names:
                _judge(where, os.fstat(here), met)
            if not names:
                return os.open(name, _READ, dir_fd=here) if read else -1, state
            step = os.open(name, _STEP, dir_fd=here)
            os.close(here)
            here, where = step, place
    finally:
        os.close(here)


def _judge(path: str, state: os.stat_result, met: list[os.stat_result]) -> None:
    met.append(state)
    if not stat.S_ISLNK(state.st_mode):
        check_unforgeable(path or ".", state)
    elif state.st_uid not in (os.geteuid(), 0):
        raise Unreadable(f"{path} is a link of user {state.st_uid}, who may let it lead elsewhere: remove it")


def _names(path: str) -> list[str]:
    """The last one first."""
    return [name for name in reversed(path.split("/")) if name] or ["."]
