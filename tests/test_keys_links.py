"""Symbolic links in a controller's folder of keys: who could change one on the way chooses whose key is read, so each is judged."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zmqserve import keyring
from zmqserve.certificate import read_pair, read_public
from zmqserve.errors import InvalidParameter
from zmqserve.keyring import Keyring

from .keyrings import Keys

ANOTHER = 12345
"""A user id that is nobody's."""


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    """Pairs of alice and a controller's ports."""
    made = Keys(tmp_path)
    made.new("alice")
    return made


def test_a_link_may_not_lead_to_where_others_write(tmp_path: Path, keys: Keys) -> None:
    """Who may write to the folder may put another file, or a folder, in the place of what is linked."""
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    shutil.copy(keys.own / "alice.key", open_to_all)
    (keys.folder / "clients" / "alice.key").symlink_to(open_to_all / "alice.key")
    with pytest.raises(InvalidParameter, match=f"{open_to_all} may be written by others"):
        Keyring(keys.folder)
    (keys.folder / "clients" / "alice.key").unlink()
    (keys.folder / "clients").rmdir()
    (open_to_all / "clients").mkdir()
    (keys.folder / "clients").symlink_to(open_to_all / "clients")
    with pytest.raises(InvalidParameter, match=f"{open_to_all} may be written by others"):
        Keyring(keys.folder)
    open_to_all.chmod(0o1777)
    assert Keyring(keys.folder).clients == {}


def test_rules_behind_a_link_that_leads_nowhere_are_not_no_rules(keys: Keys) -> None:
    (keys.folder / "access.toml").symlink_to("..data/access.toml")
    with pytest.raises(InvalidParameter, match=r"cannot read .*access\.toml"):
        Keyring(keys.folder)


def test_a_link_is_judged_anew_when_others_may_write_to_where_it_leads(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Now or later: nothing of the file, or of the link, is another then."""
    monkeypatch.setattr(keyring, "SETTLED_NS", -(10**18))  # what was just changed is read again anyhow
    (keys.folder / "clients" / "alice.key").symlink_to(keys.own / "alice.key")
    alice = read_public(keys.own / "alice.key")
    keys.own.chmod(0o755)
    ring = Keyring(keys.folder)
    assert set(ring.clients) == {alice}
    keys.own.chmod(0o777)
    changes = ring.look(thorough=True)
    assert changes is not None
    assert {peer.name for peer in changes.revoked} == {"alice"}
    assert f"{keys.own} may be written by others (mode 0777)" in changes.problems[0]
    keys.own.chmod(0o755)
    assert ring.look(thorough=True) is not None
    assert set(ring.clients) == {alice}


def test_of_several_faults_on_the_way_the_next_is_told_when_the_first_is_mended(
    tmp_path: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keyring, "SETTLED_NS", -(10**18))
    shared = tmp_path / "shared"
    shared.mkdir()
    (shared / "current").symlink_to(keys.own)
    ring = Keyring(keys.folder)
    (keys.folder / "clients" / "alice.key").symlink_to(shared / "current" / "alice.key")
    for place in (shared, keys.own):
        place.chmod(0o777)
    for place in (shared, keys.own):
        changes = ring.look(thorough=True)
        assert changes is not None
        assert changes.problems == (f"{place} may be written by others (mode 0777): chmod go-w {place}",)
        place.chmod(0o755)
    ring.look(thorough=True)
    assert [peer.name for peer, _ in ring] == ["alice"]


def test_links_on_the_way_to_the_folder_do_not_forbid_it(tmp_path: Path, keys: Keys) -> None:
    """A home that is a link, say; and above its folder a user may have what he likes."""
    keys.allow("alice", "client")
    homes = tmp_path / "homes"
    homes.mkdir(mode=0o755)
    tmp_path.chmod(0o775)
    for number, target in enumerate((str(tmp_path), "..", "home0/homes/../homes/home1")):
        home = homes / f"home{number}"
        home.symlink_to(target)
        assert [peer.name for peer, _ in Keyring(home / keys.folder.relative_to(tmp_path))] == ["alice"]
        assert read_pair(home / keys.own.relative_to(tmp_path) / "alice.key_secret") == read_pair(keys.own / "alice.key_secret")


def test_relative_paths_lead_where_the_kernel_lets_them(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    keys.allow("alice", "client")
    (keys.folder / "access.toml").symlink_to("clients/.././/rules.toml")
    (keys.folder / "rules.toml").write_text("[defaults.client]\n")
    for at, path in ((keys.folder, "."), (keys.folder / "clients", ".."), (keys.folder.parent, keys.folder.name)):
        monkeypatch.chdir(at)
        ring = Keyring(Path(path))
        assert (len(ring.clients), ring.rules) == (1, "[defaults.client]\n")


def test_a_process_without_descriptors_turns_out_nobody_behind_a_link(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    (keys.folder / "clients" / "alice.key").symlink_to(keys.own / "alice.key")
    ring = Keyring(keys.folder)

    def none_left(*_args: object, **_options: object) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "open", none_left)
    changes = ring.look()
    assert changes is not None
    assert not changes.revoked
    monkeypatch.undo()
    ring.look()
    assert [peer.name for peer, _ in ring] == ["alice"]
    monkeypatch.setattr(os, "open", none_left)
    (keys.own / "alice.key").unlink()
    changes = ring.look()
    assert changes is not None
    assert {peer.name for peer in changes.revoked} == {"alice"}


# --- links of another user -----------------------------------------------------------------------

only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")


@pytest.fixture
def linked(keys: Keys) -> Path:
    """Where a client's key is a link of another user's, to a file that is not his."""
    path = keys.folder / "clients" / "alice.key"
    give_link(path, keys.own / "alice.key")
    return path


def give_link(path: Path, target: Path) -> None:
    """Make a link that is ANOTHER's."""
    path.symlink_to(target)
    os.chown(path, ANOTHER, ANOTHER, follow_symlinks=False)


@only_root
def test_a_link_that_is_replaced_by_ones_own_counts_at_once(linked: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyring, "SETTLED_NS", -(10**18))  # what was just changed is read again anyhow
    linked.rename(keys.folder / ".aside")
    ring = Keyring(keys.folder)
    (keys.folder / ".aside").rename(linked)
    changes = ring.look()
    assert changes is not None
    assert changes.problems == (f"{linked} is a link of user {ANOTHER}, who may let it lead elsewhere: remove it",)
    linked.unlink()
    linked.symlink_to(keys.own / "alice.key")
    ring.look(thorough=True)
    assert [peer.name for peer, _ in ring] == ["alice"]


@only_root
def test_every_link_on_the_way_is_judged(tmp_path: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root's link leads through another user's, which may lead elsewhere the next moment; or through one that he may replace."""
    monkeypatch.setattr(keyring, "SETTLED_NS", -(10**18))  # what was just changed is read again anyhow
    shared = tmp_path / "shared"
    shared.mkdir()
    give_link(shared / "current", keys.own)
    (keys.folder / "clients" / "alice.key").symlink_to(shared / "current" / "alice.key")
    with pytest.raises(InvalidParameter, match=f"{shared}/current is a link of user {ANOTHER}"):
        Keyring(keys.folder)
    (shared / "current").unlink()
    (shared / "current").symlink_to(keys.own)
    ring = Keyring(keys.folder)
    assert [peer.name for peer, _ in ring] == ["alice"]
    for mode, owner in ((0o777, 0), (0o755, ANOTHER)):
        shared.chmod(mode)
        os.chown(shared, owner, owner)
        with pytest.raises(InvalidParameter, match=f"{shared} (may be written by others|belongs to user {ANOTHER})"):
            Keyring(keys.folder)
        ring.look(thorough=True)
        assert ring.clients == {}
    shared.chmod(0o1777)
    os.chown(shared, 0, 0)
    ring.look(thorough=True)
    assert [peer.name for peer, _ in ring] == ["alice"]


@only_root
@pytest.mark.parametrize("name", ["clients-port.key_secret", "workers-port.key_secret", "access.toml", "workers", "."])
def test_whatever_a_folder_of_keys_holds_may_be_no_link_of_somebody_else(tmp_path: Path, keys: Keys, name: str) -> None:
    (keys.folder / "access.toml").touch(mode=0o644)
    path = tmp_path / "linked" if name == "." else keys.folder / name
    if name == ".":
        give_link(path, keys.folder)
    else:
        path.rename(tmp_path / "there")
        give_link(path, tmp_path / "there")
    with pytest.raises(InvalidParameter, match=f"{path} is a link of user {ANOTHER}"):
        Keyring(path if name == "." else keys.folder)


@only_root
@pytest.mark.parametrize("begins", ["link", "own"])
@pytest.mark.parametrize("what", ["key", "folder on the way"])
def test_nobody_gets_in_by_exchanging_a_link_while_it_is_judged(
    tmp_path: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch, what: str, begins: str
) -> None:
    """Its owner may put what is his own in its place between any two calls, and back again: in a sticky folder it is his."""
    ring = Keyring(keys.folder)
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    kinds = {"link": shared / "link", "own": shared / "own"}
    if what == "key":
        linked = keys.folder / "clients" / "alice.key"
        give_link(kinds["link"], keys.own / "alice.key")
        kinds["own"].touch()
    else:
        linked = shared / "current"
        give_link(kinds["link"], keys.own)
        kinds["own"].mkdir()
        (keys.folder / "clients" / "alice.key").symlink_to(linked / "alice.key")
    os.chown(kinds["own"], ANOTHER, ANOTHER)
    there = begins
    kinds[there].rename(linked)
    calls = 0
    exchanged_at: tuple[int, ...] = ()

    def between_two_calls(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal calls, there
            calls += 1
            if calls in exchanged_at:
                linked.rename(kinds[there])
                there = "own" if there == "link" else "link"
                kinds[there].rename(linked)
            return real(*args, **options)

        return call

    for name in ("stat", "lstat", "open", "fstat", "readlink", "scandir"):
        monkeypatch.setattr(os, name, between_two_calls(getattr(os, name)))
    ring.look(thorough=True)
    most = calls
    assert most > 10
    for first in range(1, most + 1):
        for then in (0, first + 1, first + 2):
            calls, exchanged_at = 0, (first, then)
            ring.look(thorough=True)
            assert ring.clients == {}
