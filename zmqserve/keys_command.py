"""The command `zmqserve keys`: make keys, and say whose a controller allows. A running controller takes changes over within a second."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

from . import certificate
from .certificate import NAMED, PUBLIC_SUFFIX, SECRET_SUFFIX, Unreadable
from .errors import InvalidParameter
from .keyring import CLIENTS_PORT, FOLDERS, RULES, WORKERS_PORT, Keyring
from .terminal import printing, table


def new(args: argparse.Namespace) -> int:
    """Make a pair for a client, a worker or an admin."""
    pair = certificate.write_pair(args.dir, args.name)
    stem = args.dir / args.name
    print(f"{stem}{SECRET_SUFFIX}  the secret key: it stays on its owner's machine (--key)")
    print(f"{stem}{PUBLIC_SUFFIX}  the public key, for the controller: zmqserve keys allow DIR ROLE {stem}{PUBLIC_SUFFIX}")
    print(f"fingerprint {certificate.fingerprint(pair.public.decode())[:8]}")
    return 0


def init(args: argparse.Namespace) -> int:
    """Make a controller's folder, with the pairs of both its ports. What is there already is left as it is."""
    folder: Path = args.folder
    try:
        for path in (folder, *(folder / place for place in FOLDERS.values())):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidParameter(f"cannot make {folder}: {error.strerror or error}", data={"parameter": "folder"}) from None
    for name in (CLIENTS_PORT, WORKERS_PORT):
        if not os.path.lexists(folder / (name + SECRET_SUFFIX)):
            certificate.write_pair(folder, name)
    ring = Keyring(folder)
    print(f"zmqserve controller --curve-dir {folder}")
    for name, pair, peers in ((CLIENTS_PORT, ring.ports[0], "clients"), (WORKERS_PORT, ring.ports[1], "workers")):
        shown = certificate.fingerprint(pair.public.decode())[:8]
        print(f"{folder / name}{PUBLIC_SUFFIX}  for {peers}: their --controller-key (fingerprint {shown})")
    return 0


def allow(args: argparse.Namespace) -> int:
    """Let a key in."""
    ring = Keyring(args.folder)
    name = certificate.checked_name(args.name or args.file.name.removesuffix(PUBLIC_SUFFIX))
    try:
        key = certificate.read_public(args.file)
    except Unreadable as error:
        raise InvalidParameter(str(error), data={"parameter": "file"}) from None
    for peer, path in ring:
        if peer.key == key:
            raise InvalidParameter(f"this key is allowed already, as {peer.role} {peer.name}: {path}", data={"parameter": "file"})
        if peer.name == name:
            what = f"the name {name} is that of another key, {path}: choose one with --name, or revoke that one"
            raise InvalidParameter(what, data={"parameter": "name"})
    place = args.folder / FOLDERS[args.role]
    place.mkdir(mode=0o700, exist_ok=True)
    certificate.write_public(place / (name + PUBLIC_SUFFIX), name, key)
    print(f"{args.role} {name} is allowed (fingerprint {certificate.fingerprint(key)[:8]})")
    return 0


def revoke(args: argparse.Namespace) -> int:
    """Let a key in no more, and end what it does: every file that holds it is removed. In a folder that has faults, too."""
    name = certificate.checked_name(args.name)
    files, faults = _files(args.folder)
    named = [path for path in files if path.name == name + PUBLIC_SUFFIX]
    if not named and not faults:
        raise InvalidParameter(f"{args.folder} allows no key of the name {name}: see `zmqserve keys list`", data={"parameter": "name"})
    keys: set[str] = set().union(*(files[path] for path in named))
    roles = {place: role for role, place in FOLDERS.items()}
    for path in (*named, *(path for path in files if path not in named and files[path] & keys)):
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            faults.append(f"cannot remove {path}: {error.strerror or error}")
        else:
            print(f"{roles[path.parent.name]} {name} is revoked" if path in named else f"{path} held the same key: removed, too")
    if faults:
        raise InvalidParameter(f"the key of {name} may still be allowed: {'; '.join(faults)}", data={"parameter": "name"})
    return 0


def _files(folder: Path) -> tuple[dict[Path, set[str]], list[str]]:
    """The files that may allow a key, each with what it calls public keys, and what cannot be read."""
    files: dict[Path, set[str]] = {}
    faults: list[str] = []
    for place in FOLDERS.values():
        try:
            paths = [folder / place / name for name in sorted(os.listdir(folder / place)) if NAMED.fullmatch(name)]
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            faults.append(f"cannot list {folder / place}: {error.strerror or error}")
            continue
        for path in paths:
            files[path] = set()
            try:
                if path.is_file():
                    files[path] = certificate.public_keys(path.read_bytes().decode(errors="replace"))
            except OSError as error:
                faults.append(f"cannot read {path}: {error.strerror or error}")
    return files, faults


def show(args: argparse.Namespace) -> int:
    """List whose keys are allowed."""
    rows = []
    for peer, path in Keyring(args.folder):
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
        rows.append((peer.name, peer.role, certificate.fingerprint(peer.key)[:8], when))
    table(("NAME", "ROLE", "FINGERPRINT", "SINCE"), rows)
    return 0


def options(parser: argparse.ArgumentParser) -> None:
    """Its commands and their options."""
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        made.set_defaults(run=printing(run))
        return made

    pair = command("new", new, f"make a pair: NAME{PUBLIC_SUFFIX} and NAME{SECRET_SUFFIX}")
    pair.add_argument("name", metavar="NAME", help="what the key is called")
    pair.add_argument("--dir", type=Path, default=Path(), metavar="DIR", help="where to (default: here)")

    made = command("init", init, f"make a controller's folder: the pairs of its ports, and room for clients, admins, workers and {RULES}")
    let = command("allow", allow, "let a key in, under a role")
    out = command("revoke", revoke, "let a key in no more, and end what it does")
    listed = command("list", show, "list whose keys are allowed")
    for each in (made, let, out, listed):
        each.add_argument("folder", type=Path, metavar="DIR", help="a controller's folder of keys (its --curve-dir)")
    let.add_argument("role", choices=list(FOLDERS), metavar="ROLE", help=f"one of: {', '.join(FOLDERS)}")
    let.add_argument("file", type=Path, metavar="FILE.key", help="the public key")
    let.add_argument("--name", metavar="NAME", help="what logs and rules call it (default: from the file's name)")
    out.add_argument("name", metavar="NAME", help="a name that `zmqserve keys list` shows")
