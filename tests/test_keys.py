"""Keys in files, the folder of those that are allowed, and the command that makes and moves them."""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import zmq
from zmq import auth
from zmq.utils import z85

from zmqserve import certificate, keyring
from zmqserve.certificate import Pair, Unreadable, fingerprint, read_pair, read_public, write_pair
from zmqserve.cli import main
from zmqserve.errors import InvalidParameter
from zmqserve.keyring import FOLDERS, RULES_WAIT_S, Changes, Keyring, Peer

LONG_AGO_NS = 10**18


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A controller's folder, as the command makes it."""
    assert main(["keys", "init", str(tmp_path / "keys")]) == 0
    return tmp_path / "keys"


def public_key() -> str:
    return zmq.curve_keypair()[0].decode()


def put(folder: Path, role: str, name: str, key: str | None = None) -> str:
    """Allow a key by hand; returns it."""
    key = key or public_key()
    certificate.write_public(folder / FOLDERS[role] / f"{name}.key", name, key)
    return key


def settle(path: Path) -> None:
    """As if it had been changed long ago, so that only a change of its state makes it be read again."""
    os.utime(path, ns=(LONG_AGO_NS, LONG_AGO_NS))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- files ---------------------------------------------------------------------------------------


def test_a_pair_is_written_for_its_owner_alone_and_read_again(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        pair = write_pair(tmp_path, "alice")
    finally:
        os.umask(before)
    assert (mode(tmp_path / "alice.key_secret"), mode(tmp_path / "alice.key")) == (0o600, 0o644)
    assert read_pair(tmp_path / "alice.key_secret") == pair
    assert read_public(tmp_path / "alice.key") == pair.public.decode()
    assert pair.secret.decode() not in (tmp_path / "alice.key").read_text() + repr(pair)


def test_the_secret_file_is_never_open_to_others_not_even_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[int] = []
    real_open = os.open

    def opened(path: str, flags: int, mode: int = 0o777, **options: int) -> int:
        file = real_open(path, flags, mode, **options)
        if str(path).endswith(".key_secret"):
            modes.append(stat.S_IMODE(os.fstat(file).st_mode))
        return file

    monkeypatch.setattr(os, "open", opened)
    before = os.umask(0)
    try:
        write_pair(tmp_path, "alice")
    finally:
        os.umask(before)
    assert modes == [0o600]


def test_the_files_are_those_of_pyzmq(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "ours")
    assert auth.load_certificate(tmp_path / "ours.key_secret") == (pair.public, pair.secret)
    assert auth.load_certificate(tmp_path / "ours.key") == (pair.public, None)
    public, secret = auth.create_certificates(tmp_path, "theirs", {"mail": "a@example.org"})
    os.chmod(secret, 0o600)
    assert read_public(Path(public)) == auth.load_certificate(public)[0].decode()
    assert read_pair(Path(secret)) == auth.load_certificate(secret)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    first = write_pair(tmp_path, "alice")
    with pytest.raises(InvalidParameter, match=r"alice\.key_secret exists, and keys are never overwritten"):
        write_pair(tmp_path, "alice")
    (tmp_path / "alice.key_secret").unlink()
    with pytest.raises(InvalidParameter, match=r"alice\.key exists"):
        write_pair(tmp_path, "alice")
    assert not (tmp_path / "alice.key_secret").exists()
    assert read_public(tmp_path / "alice.key") == first.public.decode()


@pytest.mark.parametrize("bits", [0o644, 0o604, 0o620, 0o610, 0o601])
def test_a_secret_key_that_others_may_use_is_refused(tmp_path: Path, bits: int) -> None:
    write_pair(tmp_path, "alice")
    path = tmp_path / "alice.key_secret"
    path.chmod(bits)
    with pytest.raises(Unreadable, match=f"mode 0{bits:o}.*: chmod 600 {path}"):
        read_pair(path)
    path.chmod(0o400)
    read_pair(path)


@pytest.mark.parametrize("owner", [0, 12345])
def test_only_root_may_give_a_secret_key_to_a_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: int) -> None:
    """As PostgreSQL has it. Root's own files can be made by root only, so a file's owner is what fstat is made to say."""
    pair = write_pair(tmp_path, "alice")
    path = tmp_path / "alice.key_secret"
    path.chmod(0o440)
    real_fstat = os.fstat

    def owned(file: int) -> os.stat_result:
        state = list(real_fstat(file))
        state[stat.ST_UID] = owner
        return os.stat_result(state)

    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    monkeypatch.setattr(os, "fstat", owned)
    if owner == 0:
        assert read_pair(path) == pair
    else:
        with pytest.raises(Unreadable, match="may be used by others"):
            read_pair(path)


def test_a_file_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pair(tmp_path, "alice")
    real_fstat = os.fstat

    def anothers(file: int) -> os.stat_result:
        state = list(real_fstat(file))
        state[stat.ST_UID] = os.geteuid() + 1
        return os.stat_result(state)

    monkeypatch.setattr(os, "fstat", anothers)
    with pytest.raises(Unreadable, match="who may change it: chown"):
        read_public(tmp_path / "alice.key")
    with pytest.raises(Unreadable, match=r"belongs to user .* not to this process's"):
        read_pair(tmp_path / "alice.key_secret")


def test_a_public_key_that_others_may_change_is_refused(tmp_path: Path) -> None:
    write_pair(tmp_path, "alice")
    (tmp_path / "alice.key").chmod(0o664)
    with pytest.raises(Unreadable, match=r"mode 0664\): chmod go-w"):
        read_public(tmp_path / "alice.key")


PUBLIC = "CME.cZ+x^@>[YXeVI+TT1zoS=mBT93ZO.g%8eQ@U"
"""Of a pair made once: every process that runs these tests has the same cases."""
LINE = f'public-key = "{PUBLIC}"'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no public key: a line like public-key ="),
        ("public-key", "holds no public key"),
        ('public-key = "short"', "its public key is not one: 40 characters"),
        (f'public-key = "{PUBLIC}x"', "is not one"),
        (f'public-key = "{PUBLIC[:-1]}é"', "is not one"),
        (f'public-key = "{PUBLIC[:-1]} "', "is not one"),
        (f'public-key = "{"#" * 40}"', "is not one"),  # more than 32 bits each
        (f'public-key = "{"0" * 40}"', "is not one"),  # the point that any secret agrees on
        (f"{LINE}\n{LINE}\n", "more than one public key"),
        (f'{LINE}\nsecret-key = "{PUBLIC}"\n', "holds a secret key, which belongs to its owner alone"),
        ("x" * 70_000, "larger than 65536 bytes"),
        (b"\xff\xfe\x00", "is not text"),
    ],
)
def test_a_file_that_is_no_public_key_says_why(tmp_path: Path, text: str | bytes, said: str) -> None:
    path = tmp_path / "a.key"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(Unreadable, match=said) as caught:
        read_public(path)
    assert str(path) in str(caught.value)
    assert not caught.value.passes


def test_two_ways_to_write_one_key_are_one_key(tmp_path: Path) -> None:
    """z85 leaves no second spelling: numbers beyond 32 bits, which would be one, are refused above. Quotes and spaces do not matter."""
    path = tmp_path / "a.key"
    path.write_text(f"  public-key='{PUBLIC}'  \n# public-key = \"{public_key()}\"\n")
    assert read_public(path) == PUBLIC == z85.encode(z85.decode(PUBLIC.encode())).decode()


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.key")
    (tmp_path / "folder.key").mkdir()
    for name, at in (("zeros", "/dev/zero"), ("lost", "nowhere"), ("round", "round.key"), ("piped", "pipe.key")):
        (tmp_path / f"{name}.key").symlink_to(at)
    none = dict.fromkeys(("none", "lost"), "No such file") | {"round": "Too many levels"}
    for name, said in {**dict.fromkeys(("pipe", "folder", "zeros", "piped"), "is not a file"), **none}.items():
        with pytest.raises(Unreadable, match=said):
            read_public(tmp_path / f"{name}.key")


def test_a_pair_whose_halves_do_not_fit_is_refused(tmp_path: Path) -> None:
    write_pair(tmp_path, "alice")
    path = tmp_path / "alice.key_secret"
    path.write_text(path.read_text().replace(read_pair(path).public.decode(), public_key()))
    with pytest.raises(Unreadable, match="not that of the secret one"):
        read_pair(path)
    with pytest.raises(Unreadable, match=r"holds a public key only: give the file of the pair, which ends in \.key_secret"):
        read_pair(tmp_path / "alice.key")


# --- the folder ----------------------------------------------------------------------------------


def test_the_folder_says_the_role_and_the_file_the_name(folder: Path) -> None:
    keys = {role: put(folder, role, f"the.{role}_1") for role in FOLDERS}
    ring = Keyring(folder)
    assert set(ring.clients.values()) == {Peer(keys[role], f"the.{role}_1", role) for role in ("client", "admin")}
    assert ring.workers == {keys["worker"]: Peer(keys["worker"], "the.worker_1", "worker")}
    assert ring.rules is None
    assert ring.ports == (read_pair(folder / "clients-port.key_secret"), read_pair(folder / "workers-port.key_secret"))
    assert ring.ports[0] != ring.ports[1]
    assert not any(key in repr(ring) + repr(list(ring)) for key in keys.values())


def test_what_changes_is_taken_over_and_told(folder: Path) -> None:
    alice, gpu = put(folder, "client", "alice"), put(folder, "worker", "gpu")
    ring = Keyring(folder)
    assert ring.look() is None
    bob = put(folder, "client", "bob")
    assert ring.look() == Changes(frozenset(), False, ())
    assert set(ring.clients) == {alice, bob}
    (folder / "clients" / "alice.key").unlink()
    (folder / "workers" / "gpu.key").unlink()
    assert ring.look() == Changes(frozenset({Peer(alice, "alice", "client"), Peer(gpu, "gpu", "worker")}), False, ())
    assert (set(ring.clients), set(ring.workers)) == ({bob}, set())
    (folder / "access.toml").write_text("[defaults.client]\n")
    assert ring.look(1000.0) is None
    assert ring.look(1000.0 + RULES_WAIT_S) == Changes(frozenset(), True, ())
    assert ring.rules == "[defaults.client]\n"
    assert ring.look() is None


def test_a_key_that_gets_another_name_or_role_is_not_revoked(folder: Path) -> None:
    key = put(folder, "client", "alice")
    ring = Keyring(folder)
    (folder / "clients" / "alice.key").rename(folder / "clients" / "alicia.key")
    assert ring.look() == Changes(frozenset(), False, ())
    assert ring.clients[key] == Peer(key, "alicia", "client")
    (folder / "clients" / "alicia.key").rename(folder / "admins" / "alicia.key")
    assert ring.look() == Changes(frozenset(), False, ())
    assert ring.clients[key].role == "admin"
    (folder / "admins" / "alicia.key").rename(folder / "workers" / "alicia.key")
    assert ring.look() == Changes(frozenset({Peer(key, "alicia", "admin")}), False, ())
    assert (ring.clients, set(ring.workers)) == ({}, {key})


def test_a_file_that_gets_another_key_revokes_the_first(folder: Path) -> None:
    """Its name goes to the new key, and nothing of the old one's."""
    old = put(folder, "client", "alice")
    ring = Keyring(folder)
    (folder / "clients" / "alice.key").unlink()
    new = put(folder, "client", "alice")
    assert ring.look() == Changes(frozenset({Peer(old, "alice", "client")}), False, ())
    assert ring.clients == {new: Peer(new, "alice", "client")}


def test_a_change_that_leaves_size_and_times_as_they_were_is_seen(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two changes within one tick of the kernel's clock leave the same state, so a file that was just changed is read again."""
    old = put(folder, "client", "alice")
    path = folder / "clients" / "alice.key"
    now_ns = time.time_ns()
    monkeypatch.setattr(keyring, "_state", lambda *_: (now_ns, now_ns, 0, 300, 1, 0o100644, 0))
    ring = Keyring(folder)
    new = public_key()
    path.write_text(path.read_text().replace(old, new))
    assert ring.look() == Changes(frozenset({Peer(old, "alice", "client")}), False, ())
    assert set(ring.clients) == {new}


def test_files_that_have_not_changed_for_long_are_not_opened(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(folder, "client", "alice")
    monkeypatch.setattr(keyring, "SETTLED_NS", -(10**18))  # of the change's time only that of the inode cannot be set
    settle(folder / "clients" / "alice.key")
    ring = Keyring(folder)
    monkeypatch.setattr(keyring, "read_text", lambda path, _: pytest.fail(f"{path} was opened"))
    assert ring.look() is None


def written_by_all(path: Path) -> None:
    path.write_text(LINE)
    path.chmod(0o666)


def test_many_files_are_looked_at_piece_by_piece(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A controller's streams wait while it looks: so many files are read in one look, and asked for their state."""
    opened: list[Path] = []
    real_read = certificate.read_text

    def read(path: Path, by: Callable[[Path], int]) -> tuple[str, os.stat_result]:
        opened.append(path)
        return real_read(path, by)

    monkeypatch.setattr(keyring, "read_text", read)
    monkeypatch.setattr(keyring, "SETTLED_NS", -(10**18))
    ring = Keyring(folder)
    allowed = {put(folder, "client", f"k{n}") for n in range(3 * keyring.READ_AT_ONCE)}
    seen: list[int] = []
    while ring.hurried or not seen:
        opened.clear()
        ring.look()
        assert 0 < len(opened) <= keyring.READ_AT_ONCE
        seen.append(len(ring.clients))
    assert seen == [keyring.READ_AT_ONCE * (n + 1) for n in range(3)]
    assert set(ring.clients) == allowed

    monkeypatch.setattr(keyring, "ASKED_AT_ONCE", 40)
    path = folder / "clients" / "k50.key"
    old, new = read_public(path), public_key()
    path.write_text(path.read_text().replace(old, new))
    for _ in range(3):
        ring.look()
    assert set(ring.clients) == allowed - {old} | {new}
    path.write_text("")
    ring.look(thorough=True)
    assert set(ring.clients) == allowed - {old}
    for each in folder.glob("clients/*"):
        each.unlink()
    ring.look()
    assert ring.clients == {}


BROKEN: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_text(""),
    "no key": lambda path: path.write_text("hello"),
    "a link to what is no key": lambda path: path.symlink_to("/etc/passwd"),
    "a link that leads nowhere": lambda path: path.symlink_to("nowhere.key"),
    "a link to itself": lambda path: path.symlink_to("bad.key"),
    "a folder": lambda path: path.mkdir(),
    "a secret key": lambda path: path.write_text(f'public-key = "{PUBLIC}"\nsecret-key = "{PUBLIC}"'),
    "writable": written_by_all,
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_cannot_be_used_is_an_error_at_the_start_and_kept_out_later(folder: Path, what: str) -> None:
    good = put(folder, "client", "alice")
    path = folder / "clients" / "bad.key"
    ring = Keyring(folder)
    BROKEN[what](path)
    with pytest.raises(InvalidParameter, match=str(path)) as caught:
        Keyring(folder)
    assert caught.value.parameter == "curve_dir"
    changes = ring.look()
    assert changes is not None
    assert (changes.revoked, changes.rules, len(changes.problems)) == (frozenset(), False, 1)
    assert set(ring.clients) == {good}
    assert ring.look() is None  # told once


@pytest.mark.parametrize(
    "name", ["notes.txt", "alice.key_secret", "alice.key~", "a b.key", "é.key", ".key", "x" * 65 + ".key", "alice.KEY"]
)
def test_only_files_of_keys_belong_there(folder: Path, name: str) -> None:
    (folder / "clients" / name).write_text(LINE)
    if name.startswith("."):
        assert Keyring(folder).clients == {}  # an editor's, which is nobody's key
    else:
        with pytest.raises(InvalidParameter, match=r"is not NAME\.key"):
            Keyring(folder)


def test_a_key_that_breaks_is_no_longer_allowed(folder: Path) -> None:
    key = put(folder, "client", "alice")
    ring = Keyring(folder)
    (folder / "clients" / "alice.key").write_text("")
    changes = ring.look()
    assert changes is not None
    assert changes.revoked == {Peer(key, "alice", "client")}
    assert "holds no public key" in changes.problems[0]


@pytest.mark.parametrize(("role", "name"), [("client", "alice2"), ("admin", "alice"), ("worker", "gpu")])
def test_one_key_has_one_name_and_one_role_and_the_first_keeps_them(folder: Path, role: str, name: str) -> None:
    key = put(folder, "client", "alice")
    ring = Keyring(folder)
    put(folder, role, name, key)
    with pytest.raises(InvalidParameter, match="hold one key: remove one of them"):
        Keyring(folder)
    changes = ring.look()
    assert changes is not None
    assert (changes.revoked, len(changes.problems)) == (frozenset(), 1)
    assert ring.clients == {key: Peer(key, "alice", "client")}
    (folder / "clients" / "alice.key").unlink()
    changes = ring.look()
    assert changes is not None
    assert (changes.revoked, ring.clients, ring.workers) == (frozenset({Peer(key, "alice", "client")}), {}, {})
    refused = folder / FOLDERS[role] / f"{name}.key"
    said = f"{folder}/clients/alice.key is gone, and {refused} holds its key, which stays out: remove that, too, or write it anew"
    assert changes.problems == (said,)
    assert ring.look() is None  # told once
    refused.unlink()
    put(folder, role, name, key)
    assert ring.look() is not None
    assert [peer for peer, _ in ring] == [Peer(key, name, role)]


def test_a_refused_file_lets_its_key_in_only_when_it_is_written_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when something else about it changes, as with a hard link when the other is removed, or when it cannot be used for a while."""
    monkeypatch.setattr(keyring, "ASKED_AT_ONCE", 0)  # as with very many files, most of which are not asked for in a look
    key, first, second = put(folder, "client", "carol"), folder / "clients" / "carol.key", folder / "admins" / "carol-admin.key"
    ring = Keyring(folder)
    os.link(first, second)
    ring.look()
    first.unlink()
    changes = ring.look()
    assert changes is not None
    assert changes.revoked == {Peer(key, "carol", "client")}
    for bits in (0o664, 0o600):
        second.chmod(bits)
        ring.look()
        assert ring.clients == {}
    put(folder, "client", "somebody")
    ring.look()
    assert key not in ring.clients
    settle(second)
    ring.look()
    assert ring.clients[key] == Peer(key, "carol-admin", "admin")


def test_a_key_may_move_though_a_refused_file_holds_it_too(folder: Path) -> None:
    key = put(folder, "worker", "carol")
    ring = Keyring(folder)
    put(folder, "client", "copy", key)
    ring.look()
    (folder / "workers" / "carol.key").rename(folder / "workers" / "caroline.key")
    problem = f"{folder}/workers/caroline.key and {folder}/clients/copy.key hold one key: remove one of them"
    assert ring.look() == Changes(frozenset(), False, (problem,))
    assert [peer for peer, _ in ring] == [Peer(key, "caroline", "worker")]


def test_one_name_is_of_one_key(folder: Path) -> None:
    key = put(folder, "worker", "gpu")
    ring = Keyring(folder)
    put(folder, "admin", "gpu")
    with pytest.raises(InvalidParameter, match="have one name"):
        Keyring(folder)
    ring.look()
    assert (ring.clients, ring.workers) == ({}, {key: Peer(key, "gpu", "worker")})


def test_rules_that_are_gone_or_cannot_be_read_stay_in_force(folder: Path) -> None:
    rules = folder / "access.toml"
    rules.write_text("a = 1\n")
    ring = Keyring(folder)
    spoils: list[tuple[Callable[[], None], str]] = [
        (lambda: rules.chmod(0o666), "chmod go-w"),
        (rules.unlink, "is gone: the rules stay in force"),
    ]
    for spoil, said in spoils:
        spoil()
        changes = ring.look()
        assert changes is not None
        assert (changes.rules, ring.rules) == (False, "a = 1\n")
        assert said in changes.problems[0]
        assert ring.look() is None
    rules.write_text("[defaults]")
    assert ring.look(thorough=True) == Changes(frozenset(), True, ())
    assert ring.rules == "[defaults]"


@pytest.mark.parametrize("settled_ns", [keyring.SETTLED_NS, -(10**18)])
def test_rules_count_when_they_have_stayed_the_same_for_a_while(folder: Path, monkeypatch: pytest.MonkeyPatch, settled_ns: int) -> None:
    """What is written in place is seen cut short, and a part of rules that parses may allow everything."""
    monkeypatch.setattr(keyring, "SETTLED_NS", settled_ns)
    rules = folder / "access.toml"
    rules.write_text("old = 1\n")
    ring = Keyring(folder)
    looks = [("[de", 0.0), ("[defaults]\n", 0.9), ("[defaults]\nnew = 1\n", 1.8), ("[defaults]\nnew = 1\n", 2.7)]
    for text, now in looks:
        rules.write_text(text)
        assert ring.look(1000.0 + now) is None
        assert ring.rules == "old = 1\n"
    if settled_ns > 0:
        with monkeypatch.context() as broken:
            broken.setattr(keyring, "read_text", broken_off)
            assert ring.look(1003.0) is None
        assert ring.look(1003.1) is None
    assert ring.look(1004.1) == Changes(frozenset(), True, ())
    assert ring.rules == "[defaults]\nnew = 1\n"
    rules.write_text("newer = 1\n")
    assert ring.look(1005.0) is None
    rules.write_text("[defaults]\nnew = 1\n")  # and back
    assert ring.look(1006.0) is None
    assert ring.look(1007.0) is None


def broken_off(path: Path, _opened: object) -> tuple[str, os.stat_result]:
    raise Unreadable(f"cannot read {path}: Too many open files", passes=True)


def test_a_look_that_was_asked_for_takes_rules_as_they_are(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rules = folder / "access.toml"
    rules.write_text("old = 1\n")
    ring = Keyring(folder)
    rules.write_text("[defaults]\n")
    assert ring.look(1000.0) is None
    rules.write_text("[defaults]\nnew = 1\n")
    monkeypatch.setattr(keyring, "read_text", broken_off)
    assert ring.look(1001.0, thorough=True) is None  # it can only know what was there before
    monkeypatch.undo()
    assert ring.look(1002.0, thorough=True) == Changes(frozenset(), True, ())
    assert ring.rules == "[defaults]\nnew = 1\n"


@pytest.mark.parametrize("left", ["", " \n\t\n", "# Rules of the house\n\n  # by request\n"])
@pytest.mark.parametrize("thorough", [False, True])
def test_rules_that_are_emptied_stay_in_force(folder: Path, left: str, thorough: bool) -> None:
    rules = folder / "access.toml"
    rules.write_text(left)
    assert Keyring(folder).rules == left  # at the start it is what it is
    rules.write_text("a = 1\n")
    ring = Keyring(folder)
    rules.write_text(left)
    changes = ring.look(1000.0, thorough=thorough)
    let_go = "the rules stay in force; a file with the line [defaults] lets go of them"
    assert changes == Changes(frozenset(), False, (f"{rules} is empty, as if it was cut short: {let_go}",))
    for now in (1001.0, 1002.0, 1003.0):
        assert ring.look(now, thorough=thorough) is None  # told once
        assert ring.rules == "a = 1\n"
    rules.write_text("[defaults]\n")
    assert ring.look(thorough=True) == Changes(frozenset(), True, ())


def test_a_folder_that_is_gone_allows_nobody(folder: Path) -> None:
    key = put(folder, "client", "alice")
    ring = Keyring(folder)
    (folder / "clients").rename(folder / "away")
    changes = ring.look()
    assert changes is not None
    assert changes.revoked == {Peer(key, "alice", "client")}
    (folder / "clients").symlink_to(folder / "nowhere")
    with pytest.raises(InvalidParameter, match="clients is a link that leads nowhere"):
        Keyring(folder)
    (folder / "clients").unlink()
    (folder / "clients").write_text("")
    with pytest.raises(InvalidParameter, match="clients is not a folder"):
        Keyring(folder)
    assert ring.look() is not None
    assert ring.clients == {}


def test_a_folder_that_others_may_write_to_is_refused(folder: Path) -> None:
    for path in (folder, folder / "admins"):
        path.chmod(0o770)
        with pytest.raises(InvalidParameter, match=f"chmod go-w {path}"):
            Keyring(folder)
        path.chmod(0o700)
    Keyring(folder)


def test_a_process_without_descriptors_turns_nobody_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Strangers may use them all up, before anything is known of them."""
    key = put(folder, "client", "alice")
    ring = Keyring(folder)

    def none_left(*_args: object, **_options: object) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "open", none_left)
    monkeypatch.setattr(os, "scandir", none_left)
    changes = ring.look()
    assert changes is not None
    assert changes.revoked == frozenset()
    assert "Too many open files" in changes.problems[0]
    assert set(ring.clients) == {key}
    monkeypatch.undo()
    bob = put(folder, "client", "bob")
    ring.look()
    assert set(ring.clients) == {key, bob}
    monkeypatch.setattr(os, "open", none_left)
    (folder / "clients" / "bob.key").unlink()
    changes = ring.look()
    assert changes is not None
    assert changes.revoked == {Peer(bob, "bob", "client")}  # or who takes them would never be revoked
    assert set(ring.clients) == {key}


def test_no_ports_no_keyring(tmp_path: Path) -> None:
    with pytest.raises(InvalidParameter, match=r"clients-port\.key_secret does not exist: `zmqserve keys init .*` makes it"):
        Keyring(tmp_path)


@pytest.mark.parametrize("port", ["clients-port", "workers-port"])
def test_the_secret_key_of_a_port_is_guarded_too(folder: Path, port: str) -> None:
    (folder / f"{port}.key_secret").chmod(0o644)
    with pytest.raises(InvalidParameter, match=rf"chmod 600 .*{port}\.key_secret"):
        Keyring(folder)


def test_keys_that_come_and_go_while_they_are_looked_at(folder: Path) -> None:
    stays = put(folder, "client", "stays")
    ring = Keyring(folder)
    ended = threading.Event()

    def churn() -> None:
        while not ended.is_set():
            put(folder, "client", "comes")
            (folder / "clients" / "comes.key").unlink()

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        for _ in range(500):
            ring.look()
            assert stays in ring.clients
    finally:
        ended.set()
        thread.join()
    ring.look()
    assert set(ring.clients) == {stays}


# --- the command ---------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    code = main(["keys", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_from_a_new_key_to_an_allowed_and_a_revoked_one(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    code, said, _ = run(capsys, "new", "alice", "--dir", tmp_path)
    key = read_public(tmp_path / "alice.key")
    assert (code, mode(tmp_path / "alice.key_secret")) == (0, 0o600)
    assert f"fingerprint {fingerprint(key)[:8]}" in said
    code, said, _ = run(capsys, "allow", folder, "client", tmp_path / "alice.key")
    assert (code, said) == (0, f"client alice is allowed (fingerprint {fingerprint(key)[:8]})\n")
    assert Keyring(folder).clients == {key: Peer(key, "alice", "client")}
    code, said, _ = run(capsys, "list", folder)
    assert said.split() == ["NAME", "ROLE", "FINGERPRINT", "SINCE", "alice", "client", fingerprint(key)[:8], *said.split()[-2:]]
    assert run(capsys, "revoke", folder, "alice")[:2] == (0, "client alice is revoked\n")
    assert Keyring(folder).clients == {}


def test_init_leaves_what_is_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ports = Keyring(folder).ports
    put(folder, "client", "alice")
    code, said, _ = run(capsys, "init", folder)
    assert (code, Keyring(folder).ports) == (0, ports)
    assert f"fingerprint {fingerprint(ports[0].public.decode())[:8]}" in said
    assert {mode(path) for path in (folder, *(folder / place for place in FOLDERS.values()))} == {0o700}


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", ".hidden", "é", "x" * 65, "a\n"])
def test_a_name_that_is_none(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    before = sorted(tmp_path.rglob("*"))
    for arguments in (("new", "--dir", tmp_path, "--", name), ("revoke", folder, name)):
        code, _, said = run(capsys, *arguments)
        assert (code, "a key's name has 1 to 64 of the characters" in said) == (2, True)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_allow_refuses(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pair(tmp_path, "alice")
    run(capsys, "allow", folder, "client", tmp_path / "alice.key")
    for arguments, what in (
        (("client", tmp_path / "alice.key"), "this key is allowed already, as client alice"),
        (("admin", tmp_path / "alice.key", "--name", "boss"), "this key is allowed already, as client alice"),
        (("client", tmp_path / "alice.key_secret", "--name", "x"), "holds a secret key"),
        (("client", tmp_path / "none.key"), "No such file"),
    ):
        code, _, said = run(capsys, "allow", folder, *arguments)
        assert (code, what in said) == (2, True), said
    write_pair(tmp_path, "other")
    code, _, said = run(capsys, "allow", folder, "worker", tmp_path / "other.key", "--name", "alice")
    assert (code, "the name alice is that of another key" in said) == (2, True)
    assert [peer.name for peer, _ in Keyring(folder)] == ["alice"]


def test_revoke_works_in_a_folder_with_faults(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(folder, "client", "alice")
    (folder / "clients" / "broken.key").write_bytes(b"\xff")
    (folder / "workers" / "folder.key").mkdir()
    os.mkfifo(folder / "workers" / "pipe.key")
    assert run(capsys, "revoke", folder, "alice")[0] == 0
    assert run(capsys, "revoke", folder, "broken")[0] == 0
    code, _, said = run(capsys, "revoke", folder, "alice")
    assert (code, "allows no key of the name alice" in said) == (2, True)


def test_a_key_that_is_revoked_is_out_under_all_its_names(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key, other = put(folder, "client", "carol"), put(folder, "client", "dave")
    put(folder, "admin", "carol-admin", key)
    put(folder, "worker", "writable", key)
    (folder / "workers" / "writable.key").chmod(0o666)  # which is kept out, but for as long as it is
    (folder / "workers" / "noted.key").write_text(f'# not public-key = "{key}"\n  public-key = "{public_key()}"\n')
    (folder / "workers" / "lost.key").symlink_to("nowhere")
    for name in (".carol.key", "carol.key_secret", "carol.key~"):  # never a key that is let in
        (folder / "clients" / name).write_text((folder / "clients" / "carol.key").read_text())
    capsys.readouterr()
    code, said, _ = run(capsys, "revoke", folder, "carol")
    also = [folder / "admins" / "carol-admin.key", folder / "workers" / "writable.key"]
    assert (code, said.splitlines()) == (0, ["client carol is revoked", *(f"{path} held the same key: removed, too" for path in also)])
    left = {path.name for path in folder.glob("*s/*")}
    assert left == {".carol.key", "carol.key_secret", "carol.key~", "dave.key", "lost.key", "noted.key"}
    assert other == read_public(folder / "clients" / "dave.key")


def test_revoke_says_what_may_hold_the_key_still(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    key = put(folder, "client", "carol")
    put(folder, "admin", "stays", key)
    put(folder, "worker", "goes", key)
    put(folder, "worker", "other")
    real_read, real_unlink = Path.read_bytes, Path.unlink

    def read(path: Path) -> bytes:
        if path.name == "other.key":
            raise PermissionError(13, "Permission denied")
        return real_read(path)

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name == "stays.key":
            raise PermissionError(1, "Operation not permitted")
        real_unlink(path, missing_ok)

    monkeypatch.setattr(Path, "read_bytes", read)
    monkeypatch.setattr(Path, "unlink", unlink)
    code, _, said = run(capsys, "revoke", folder, "carol")
    kept = f"cannot read {folder}/workers/other.key: Permission denied; cannot remove {folder}/admins/stays.key: Operation not permitted"
    assert (code, f"the key of carol may still be allowed: {kept}" in said) == (2, True), said
    assert sorted(path.name for path in folder.glob("*s/*")) == ["other.key", "stays.key"]


def test_a_pair_tells_nobody_its_secret() -> None:
    public, secret = zmq.curve_keypair()
    assert secret.decode() not in repr(Pair(public, secret)) + str(Pair(public, secret))
