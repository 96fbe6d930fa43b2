"""Keys in a mounted secret, laid out and replaced as Kubernetes does it: visible names are links through `..data`, which is swapped.

The order of the steps is that of kubelet's AtomicWriter; the folder itself has mode 1777, as that of its tmpfs.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from zmqserve import Client, Controller
from zmqserve.certificate import Unreadable, read_pair, read_public
from zmqserve.errors import InvalidParameter, Unauthenticated
from zmqserve.keyring import Keyring

from .keyrings import Keys
from .processes import PATIENCE_S, eventually

ANOTHER = 12345
"""A user id that is nobody's."""
_versions = count(1)


class Mount:
    """A volume at a folder. `write` makes these files, by their path in it, its whole content."""

    def __init__(self, folder: Path, mode: int = 0o440) -> None:
        folder.mkdir(exist_ok=True)
        folder.chmod(0o1777)
        self.folder = folder
        self._mode = mode

    def write(self, files: dict[str, str]) -> None:
        data = self.folder / "..data"
        old = Path(os.readlink(data)) if data.is_symlink() else None
        new = self.folder / f"..2026_01_01_00_00_00.{next(_versions)}"
        new.mkdir(mode=0o755)
        for name, text in files.items():
            path = new / name
            path.parent.mkdir(mode=0o755, exist_ok=True)
            path.write_text(text)
            path.chmod(self._mode)
        visible = {name.split("/")[0] for name in files}
        for name in visible:
            if not (self.folder / name).is_symlink():
                (self.folder / name).symlink_to(f"..data/{name}")
        (self.folder / "..data_tmp").symlink_to(new.name)
        os.replace(self.folder / "..data_tmp", data)
        for path in self.folder.iterdir():
            if not path.name.startswith("..") and path.name not in visible:
                path.unlink()
        if old is not None:
            shutil.rmtree(self.folder / old)


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    """Pairs of alice, bob and gpu, and of a controller's ports."""
    made = Keys(tmp_path)
    for name in ("alice", "bob", "gpu"):
        made.new(name)
    return made


def ports(keys: Keys) -> dict[str, str]:
    return {path.name: path.read_text() for path in keys.folder.iterdir() if path.is_file()}


def public(keys: Keys, *names: str, under: str = "") -> dict[str, str]:
    return {f"{under}{name}.key": (keys.own / f"{name}.key").read_text() for name in names}


Put = Callable[..., None]


@pytest.fixture(params=["one volume", "a volume for each folder"])
def mounted(request: pytest.FixtureRequest, tmp_path: Path, keys: Keys) -> tuple[Path, Put]:
    """The folder, and what replaces the clients' keys in it by those of these names."""
    # The secrets are the test's own user's here, and only root's own may be of a group.
    mode = 0o440 if os.geteuid() == 0 else 0o400
    whole = Mount(tmp_path / "mounted", mode)
    if request.param == "one volume":
        rest = {**ports(keys), **public(keys, "gpu", under="workers/")}
        return whole.folder, lambda *names: whole.write({**rest, **public(keys, *names, under="clients/")})
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o755)
    whole.write(ports(keys))
    for file in ports(keys):
        (folder / file).symlink_to(whole.folder / file)  # as with a mount's subPath, which cannot be replaced
    clients, workers = Mount(folder / "clients", mode), Mount(folder / "workers", mode)
    workers.write(public(keys, "gpu"))
    return folder, lambda *names: clients.write(public(keys, *names))


def status_of(name: str, keys: Keys, controller: Controller) -> None:
    with Client(controller.client_endpoints[0], **keys.as_client(name)) as client:
        client.status()


def test_a_swap_of_the_volume_lets_in_and_turns_out(mounted: tuple[Path, Put], keys: Keys) -> None:
    folder, put = mounted
    put("alice")
    lines: list[tuple[str, object]] = []
    ends = ["tcp://127.0.0.1:*"]
    controller = Controller(
        clients=ends, workers=ends, curve_dir=str(folder), report=lambda event, **fields: lines.append((event, fields.get("why")))
    )
    with controller, Client(controller.client_endpoints[0], **keys.as_client("alice")) as alice:
        alice.status()
        with pytest.raises(Unauthenticated):
            status_of("bob", keys, controller)
        put("bob")
        eventually(lambda: any(event == "keys changed" for event, _ in lines), PATIENCE_S, "the swap is seen")
        status_of("bob", keys, controller)
        with pytest.raises(Unauthenticated):
            alice.status()
    assert not [why for event, why in lines if event == "key not usable"]


@pytest.mark.parametrize("call", ["scandir", "lstat", "open"])
def test_who_stays_is_not_turned_out_when_the_folder_is_taken_away_under_the_look(
    mounted: tuple[Path, Put], keys: Keys, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """The old folder goes at once. Who was on the way in it finds that nothing is there, once; and a list of it ends early."""
    folder, put = mounted
    put("alice")
    ring = Keyring(folder)
    alice = read_public(keys.own / "alice.key")
    real = getattr(os, call)
    swaps = iter([("alice", "bob")])

    def swapped_under(path: int | str | Path, *args: Any, **options: Any) -> Any:
        # Folders are listed by a descriptor, and the first is the clients'.
        if (call == "scandir" or os.path.basename(str(path)) == "alice.key") and (names := next(swaps, None)):
            # A list that was begun in the old folder, and one of an empty folder, end alike.
            begun = real(path, *args, **options) if call == "scandir" else None
            put(*names)
            if begun is None:
                raise FileNotFoundError(2, "No such file or directory", str(path))
            return begun
        return real(path, *args, **options)

    monkeypatch.setattr(os, call, swapped_under)
    changes = ring.look()
    assert next(swaps, None) is None
    assert alice in ring.clients
    assert changes is None or not changes.revoked
    assert changes is None or not changes.problems
    ring.look()
    assert {peer.name for peer in ring.clients.values()} == {"alice", "bob"}


# --- what is judged ------------------------------------------------------------------------------


def test_a_key_file_may_be_a_link_and_the_file_itself_is_judged(tmp_path: Path, keys: Keys) -> None:
    own = keys.own / "alice.key_secret"
    link = tmp_path / "mine.key_secret"
    link.symlink_to(own)
    assert read_pair(link) == read_pair(own)
    own.chmod(0o604)
    with pytest.raises(Unreadable, match=r"mine\.key_secret may be used by others \(mode 0604\)"):
        read_pair(link)


# --- as another user -----------------------------------------------------------------------------

only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")


@pytest.fixture
def shown(keys: Keys) -> Iterator[Path]:
    """A mounted folder with a key of alice's that other users can reach: root's, and of the group ANOTHER (an fsGroup)."""
    folder = Path(tempfile.mkdtemp(prefix="zmqserve-mounted-"))
    folder.chmod(0o755)
    mount = Mount(folder / "keys")
    mount.write({**ports(keys), **public(keys, "alice", under="clients/")})
    for path in (mount.folder, *mount.folder.rglob("*")):
        os.chown(path, 0, ANOTHER, follow_symlinks=False)
    try:
        yield mount.folder
    finally:
        shutil.rmtree(folder)


def seen_by_another(folder: Path, *groups: int) -> str:
    """What a process of user ANOTHER, in these groups, finds there: the names, or why nothing."""
    # Not a new program: where the interpreter lies, only its owner may be able to go.
    here, there = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_look_as_another, args=(there, folder, groups))
    child.start()
    there.close()
    said: str = here.recv()
    child.join(PATIENCE_S)
    here.close()
    return said


def _look_as_another(pipe: Connection, folder: Path, groups: tuple[int, ...]) -> None:
    os.setgroups(groups)
    os.setgid(ANOTHER + 1)
    os.setuid(ANOTHER)
    try:
        pipe.send(str([peer.name for peer, _ in Keyring(folder)]))
    except InvalidParameter as error:
        pipe.send(str(error))


@only_root
def test_a_program_of_another_user_reads_roots_files_by_its_group(shown: Path) -> None:
    assert seen_by_another(shown, ANOTHER) == "['alice']"
    assert "clients-port.key_secret: Permission denied" in seen_by_another(shown)


@only_root
@pytest.mark.parametrize("mode", [0o444, 0o460, 0o450])
def test_a_group_may_only_read_and_others_nothing(shown: Path, mode: int) -> None:
    (shown / "clients-port.key_secret").chmod(mode)
    assert f"may be used by others (mode 0{mode:o})" in seen_by_another(shown, ANOTHER)


@only_root
def test_what_somebody_else_puts_into_a_sticky_folder_is_not_used(shown: Path, keys: Keys) -> None:
    """He cannot replace a link there, but make one: to a file of root's that was meant for something else."""
    (shown / "clients").unlink()
    clients = Mount(shown / "clients").folder
    (clients / "alice.key").symlink_to("../..data/clients/alice.key")
    assert seen_by_another(shown, ANOTHER) == "['alice']"
    os.chown(clients / "alice.key", 54321, 54321, follow_symlinks=False)
    assert "alice.key is a link of user 54321, who may let it lead elsewhere" in seen_by_another(shown, ANOTHER)
    (clients / "alice.key").unlink()
    (clients / "mallory.key").write_text((keys.own / "bob.key").read_text())
    os.chown(clients / "mallory.key", 54321, 54321)
    assert "mallory.key belongs to user 54321, who may change it" in seen_by_another(shown, ANOTHER)
