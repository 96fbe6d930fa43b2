"""Whose keys a controller allows: a folder with one file for each, looked at again and again while the controller runs.

::

    DIR/clients-port.key_secret   the pair of the socket for clients, and beside it the public key, which clients are given
    DIR/workers-port.key_secret   the pair of the socket for workers, likewise
    DIR/clients/NAME.key          a client's public key, under the name by which logs and rules know it
    DIR/admins/NAME.key           a client's that may drain workers and see all requests
    DIR/workers/NAME.key          a worker's
    DIR/access.toml               what each may do, optional

Each may be a symbolic link to such a file or folder, as where Kubernetes mounts a secret: what it leads to is judged and
read, and so is each link on the way.
The folder says the role, never the file. Names of keys appear in logs and in status, keys never do.
"""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from errno import EAGAIN
from pathlib import Path
from typing import NamedTuple, TypeAlias

from .certificate import (
    NAMED,
    PUBLIC_SUFFIX,
    SECRET_SUFFIX,
    Pair,
    Unreadable,
    check_unforgeable,
    public_key,
    read_text,
    secret_pair,
)
from .errors import InvalidParameter
from .links import link_state, mark, opened

CLIENT, ADMIN, WORKER = "client", "admin", "worker"
FOLDERS: Mapping[str, str] = {CLIENT: "clients", ADMIN: "admins", WORKER: "workers"}
"""Where the keys of each role lie."""
CLIENTS_PORT, WORKERS_PORT = "clients-port", "workers-port"
RULES = "access.toml"

RULES_WAIT_S = 1.0
"""Changed rules count when two looks so far apart have read the same: what was cut short may be rules, too, and allow everything."""
NO_RULES = "[defaults]"
"""What lets go of rules: a file that says it is whole, which an empty one does not."""
SETTLED_NS = 2 * 10**9
"""A file that was changed so shortly before it was read is read once more: a second change may have left the same times behind."""
ASKED_AT_ONCE, READ_AT_ONCE = 250, 32
"""Files whose state is asked for, and that are opened, in one look of a running controller: it takes a few ms, 10 if all are links, and all
streams wait."""
MOST_FILES = 2**31
LISTED = 3
"""Times that a folder is listed at most, where a mounted one is replaced meanwhile: what was listed may be a part of it, or gone."""
MOST_TOLD = 3
"""Problems that one error names."""


_State: TypeAlias = tuple[int, ...]
"""Of a file, with the links that lead to it; three times first."""


class Peer(NamedTuple):
    """Whose key it is. `key`: z85 text, for comparing only. `role`: ``client``, ``admin`` or ``worker``."""

    key: str
    name: str
    role: str

    def __repr__(self) -> str:
        return f"Peer({self.name!r}, {self.role})"


class Changes(NamedTuple):
    """What `Keyring.look` has found. `revoked`: those that were clients or workers and are no more. `rules`: that text is another.
    `problems`: what cannot be used, where that is news."""

    revoked: frozenset[Peer]
    rules: bool
    problems: tuple[str, ...]


class _File(NamedTuple):
    """What one file holds, in the state that it was read in: a key or the text of the rules, or a `problem`. `stale`: it could not be read
    the last time, though it may the next."""

    state: _State
    settled: bool
    raw: str
    held: str
    problem: str
    stale: bool = False


class _Twin(NamedTuple):
    """A file that is refused because its `key` is in force by another one, `first`. `left`: what it was like when that one went; None where
    that one is there."""

    key: str
    first: str
    left: tuple[int, int] | None


class Keyring:
    """The keys allowed in a folder. `clients` (admins, too) and `workers` are by key and replaced at each change, `rules` is the text of
    access.toml, None without one; `ports` are the pairs of the two sockets. `hurried`: `look` has left files for the next time.

    Raises InvalidParameter for anything in the folder that cannot be used. What cannot be used later, when `look` finds it, is not
    allowed (of two files with one key or one name, the one that came later; where it is the key, also when the other goes); of rules that
    cannot, the old ones stay.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rules_path = folder / RULES
        self.clients: Mapping[str, Peer] = {}
        self.workers: Mapping[str, Peer] = {}
        self.rules: str | None = None
        self.hurried = False
        self._asked = 0
        self._states: dict[str, _State] = {}
        self._files: dict[str, _File] = {}
        self._places: dict[str, str] = {}
        self._twins: dict[str, _Twin] = {}
        self._awaited: tuple[str, float] | None = None
        self._faults: list[str] = []
        self._problems: list[str] = []
        try:
            self.ports: tuple[Pair, Pair] = (self._port(CLIENTS_PORT), self._port(WORKERS_PORT))
            _check_folder(folder)
        except Unreadable as error:
            raise _wrong(str(error)) from None
        except OSError as error:
            raise _wrong(f"cannot open {folder}: {error.strerror or error}") from None
        changes = self.look(thorough=True)
        if changes is not None and changes.problems:
            left = len(changes.problems) - MOST_TOLD
            raise _wrong("; ".join(changes.problems[:MOST_TOLD]) + (f"; and {left} more" if left > 0 else ""))

    def __repr__(self) -> str:
        return f"Keyring({str(self.folder)!r}, {len(self.clients)} clients, {len(self.workers)} workers)"

    def __iter__(self) -> Iterator[tuple[Peer, Path]]:
        """All that are allowed, by role and name, with their files."""
        peers = sorted([*self.clients.values(), *self.workers.values()], key=lambda peer: (peer.role, peer.name))
        return iter([(peer, Path(self._places[peer.key])) for peer in peers])

    def look(self, now: float | None = None, *, thorough: bool = False) -> Changes | None:
        """See what has changed in the folder, and take it over. None when nothing has. Files that come and go are seen at once; where
        there are hundreds it takes some looks to notice that one has changed, and rules count at the second look that reads them, unless
        this one is `thorough`. `now`: of time.monotonic(), in seconds."""
        now = time.monotonic() if now is None else now
        faults: list[str] = []
        states = self._seen(faults, MOST_FILES if thorough else ASKED_AT_ONCE)
        waits = self.hurried or self._awaited is not None or not all(file.settled for file in self._files.values())
        if states == self._states and faults == self._faults and not waits:
            return None
        self._states, self._faults = states, faults
        self._read(states, MOST_FILES if thorough else READ_AT_ONCE)
        # Once each: that of a folder may be that of all links that lead there.
        problems = list(dict.fromkeys([*faults, *(file.problem for file in self._files.values() if file.problem)]))
        sides, places = self._sorted(problems)
        rules = self._rules(problems, now, at_once=thorough)
        was_rules, was_problems = self.rules, self._problems
        both = ((self.clients, sides[CLIENT]), (self.workers, sides[WORKER]))
        same = all(before == after for before, after in both) and rules == was_rules and problems == was_problems
        revoked = frozenset(peer for before, after in both for key, peer in before.items() if key not in after)
        self.clients, self.workers, self.rules, self._places, self._problems = sides[CLIENT], sides[WORKER], rules, places, problems
        return None if same else Changes(revoked, rules != was_rules, tuple(each for each in problems if each not in was_problems))

    def _port(self, name: str) -> Pair:
        path = self.folder / (name + SECRET_SUFFIX)
        if not path.exists():
            raise Unreadable(f"{path} does not exist: `zmqserve keys init {self.folder}` makes it")
        return secret_pair(path, *read_text(path, opened))

    def _seen(self, faults: list[str], most: int) -> dict[str, _State]:
        """The state of each file in the folders, and of the rules, with what is wrong with the folders. Nothing is opened, and of the
        files that are known only so many are asked for their state: the next ones after those that were asked the last time."""
        states: dict[str, _State] = {}
        with suppress(OSError):
            states[str(self.rules_path)] = _state(*link_state(str(self.rules_path)))  # first, so that they are read in every look
        count, first = 0, self._asked
        for place in FOLDERS.values():
            folder = self.folder / place
            try:
                for path in _listed(folder):
                    known = self._states.get(path)
                    if known is None or first <= count < first + most or path in self._twins:
                        with suppress(FileNotFoundError):  # since it was listed
                            states[path] = _state(*link_state(path))
                    else:
                        states[path] = known
                    count += 1
            except FileNotFoundError:
                if os.path.islink(folder):
                    faults.append(f"{folder} is a link that leads nowhere")
            except Unreadable as error:
                faults.append(str(error))
            except (PermissionError, NotADirectoryError) as error:
                faults.append(f"cannot list {folder}: {error.strerror}")
            except OSError as error:
                # It is this process that is in trouble: no reason to turn everybody out. Whose file is gone is out all the same: with his
                # connections the owner of a key can take all descriptors, and would never be revoked.
                faults.append(
                    f"cannot list {folder}: {error.strerror or error}; until it can be, keys that are removed are out, and new ones not in"
                )
                within = str(folder) + os.sep
                states |= {path: state for path, state in self._states.items() if path.startswith(within) and not _gone(path)}
        self._asked = first + most if first + most < count else 0
        return states

    def _read(self, states: Mapping[str, _State], most: int) -> None:
        """Open what is new or may have changed."""
        before, self._files, self.hurried = self._files, {}, False
        for path, state in states.items():
            known = before.get(path)
            if known is None or known.state != state or not known.settled:
                if most <= 0:
                    self.hurried = True
                    if known is None:
                        continue
                else:
                    most -= 1
                    known = self._file(path, state, known)
            self._files[path] = known

    def _file(self, path: str, state: _State, known: _File | None) -> _File:
        settled = time.time_ns() - max(state[:3]) > SETTLED_NS
        raw = ""
        try:
            if path != str(self.rules_path) and not NAMED.fullmatch(os.path.basename(path)):
                raise Unreadable(f"{path} is not NAME{PUBLIC_SUFFIX}, with a name of up to 64 of A-Z a-z 0-9 . _ -")
            raw, seen = read_text(Path(path), opened)
            if known is not None and known.raw == raw and known.state == state:
                return known._replace(settled=settled, stale=False)
            if path != str(self.rules_path):
                return _File(state, settled, raw, public_key(Path(path), raw, seen), "")
            check_unforgeable(Path(path), seen)
            return _File(state, settled, raw, raw, "")
        except Unreadable as error:
            if error.passes and known is not None:
                return known._replace(settled=False, stale=True)
            return _File(state, settled and not error.passes, raw, "", str(error))

    def _sorted(self, problems: list[str]) -> tuple[dict[str, dict[str, Peer]], dict[str, str]]:
        """Clients and workers by key, and their files. Those in force come first: they keep their place against newcomers. A file that was
        refused because of one in force does not take its place when that goes: whoever removed it meant the key."""
        sides: dict[str, dict[str, Peer]] = {CLIENT: {}, WORKER: {}}
        places: dict[str, str] = {}
        by_name: dict[str, str] = {}
        roles = {place: role for role, place in FOLDERS.items()}
        order = list(FOLDERS.values())
        # What cannot be read for now is not forgotten: it may be again.
        twins = {path: twin for path, twin in self._twins.items() if path in self._files and not self._files[path].held}
        found = []
        for path, file in self._files.items():
            if file.held and path != str(self.rules_path):
                place, name = path.split(os.sep)[-2:]
                rank = 0 if self._places.get(file.held) == path else 2 if path in self._twins else 1
                found.append((rank, order.index(place), name.removesuffix(PUBLIC_SUFFIX), path, file.held))
        for _, place_number, name, path, key in sorted(found):
            role = roles[order[place_number]]
            twin, written = self._twins.get(path), _written(self._files[path].state)
            if key in places:
                twins[path] = _Twin(key, places[key], None)
                problems.append(f"{places[key]} and {path} hold one key: remove one of them")
            elif twin is not None and twin.key == key and twin.left in (None, written):
                twins[path] = twin._replace(left=written)
                problems.append(f"{twin.first} is gone, and {path} holds its key, which stays out: remove that, too, or write it anew")
            elif name in by_name:
                problems.append(f"{by_name[name]} and {path} have one name: remove one of them")
            else:
                places[key] = by_name[name] = path
                sides[WORKER if role == WORKER else CLIENT][key] = Peer(key, name, role)
        self._twins = twins
        return sides, places

    def _rules(self, problems: list[str], now: float, *, at_once: bool) -> str | None:
        """Once there were rules they are not dropped because they cannot be read, or are cut short: that would allow what they forbid."""
        file, awaited, self._awaited = self._files.get(str(self.rules_path)), self._awaited, None
        were = self.rules is not None and not _blank(self.rules)
        let_go = f"the rules stay in force; a file with the line {NO_RULES} lets go of them"
        if file is None and self.rules is not None:
            problems.append(f"{self.rules_path} is gone: {let_go}")
        if file is None or file.problem or file.stale or file.held == self.rules:
            return self.rules
        if were and _blank(file.held):
            problems.append(f"{self.rules_path} is empty, as if it was cut short: {let_go}")
            return self.rules
        text, until_s = awaited if awaited is not None and awaited[0] == file.held else (file.held, now + RULES_WAIT_S)
        if at_once or now >= until_s:
            return text
        self._awaited = text, until_s
        return self.rules


def _listed(folder: Path) -> list[str]:
    """The paths of what lies there and is not hidden: editors' files, and those behind the links of a mounted folder. Raises Unreadable for
    a folder that others may change, and OSError."""
    for left in reversed(range(LISTED)):
        try:
            file = opened(folder)
            try:
                seen = os.fstat(file)
                if not stat.S_ISDIR(seen.st_mode):
                    raise Unreadable(f"{folder} is not a folder")
                check_unforgeable(folder, seen)
                with os.scandir(file) as entries:
                    paths = [str(folder / entry.name) for entry in entries if not entry.name.startswith(".")]
            finally:
                os.close(file)
            if os.path.samestat(seen, os.stat(folder)):
                return paths
        except FileNotFoundError:
            if not left:
                raise
    raise BlockingIOError(EAGAIN, "it is replaced all the time")


def _gone(path: str) -> bool:
    """Whether there is nothing at a path, or where its link leads. It takes no descriptor to see that; twice, as a mounted folder may be
    replaced just then."""
    for _ in range(2):
        try:
            os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            return False
        return False
    return True


def _check_folder(folder: Path) -> None:
    """Raise Unreadable for one that others may change, and OSError."""
    file = opened(folder)
    try:
        check_unforgeable(folder, os.fstat(file))
    finally:
        os.close(file)


def _state(seen: os.stat_result, met: Sequence[os.stat_result] = ()) -> _State:
    """With what was judged on the way: where a link, or who may change it, is another, the file is judged anew."""
    linked = max((each.st_ctime_ns for each in met if stat.S_ISLNK(each.st_mode)), default=0)
    marks = (number for each in met for number in mark(each))
    return seen.st_mtime_ns, seen.st_ctime_ns, linked, seen.st_size, seen.st_ino, seen.st_mode, seen.st_uid, *marks


def _written(state: _State) -> tuple[int, int]:
    """What is another when a file was written anew, and not when a hard link of it was removed."""
    return state[0], state[4]


def _blank(rules: str) -> bool:
    """Whether nothing is said, but for comments: all that is left of a file that was cut short, perhaps."""
    return not any(line.strip() and not line.lstrip().startswith("#") for line in rules.splitlines())


def _wrong(what: str) -> InvalidParameter:
    return InvalidParameter(f"curve_dir: {what}", data={"parameter": "curve_dir"})
