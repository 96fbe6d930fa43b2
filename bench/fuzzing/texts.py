"""Files that people write and others may damage: settings, rules, keys. The only errors are those that name the file."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path
from random import Random

from zmqserve.certificate import Unreadable, read_pair, read_public
from zmqserve.config import load_config
from zmqserve.errors import InvalidParameter
from zmqserve.rules import load_rules

from .broker import RULES
from .mutator import Mutator
from .target import Input, NewTarget

CONFIG = b"""# a controller
clients = ["tcp://127.0.0.1:5570", "ipc:///tmp/c.ipc"]
workers = ["tcp://127.0.0.1:5571"]
parents = []
name = "here"
dispatch = "lottery"
ttl_s = 3.0
queue_requests = 4000
outbox_bytes = 16_777_216
default_deadline_s = 600
seed = 7
"""
WORDS = tuple(b"[|]|[[|=|\"|'''|\n|\0|\xff|inf|nan|-1|1e400|99999999999999999999999|{}|#".split(b"|"))
HEAVY = (b"x = " + b"[" * 3000, b"x = " + b"9" * 5000, b"x = " + b"{a=" * 3000)


MEMORY = Path("/dev/shm")  # noqa: S108 - each target makes a folder of its own there
"""Where there is one, files do not wait for a disk."""
CERTIFICATE = b"""# a certificate

metadata
curve
    public-key = "Yne@$w-vo<fVvi]a<NY6T1ed:M$fCG*[IaLV{hID"
"""


class FileTarget:
    """A file of text with bytes and words changed. `read` takes `path`, and raises InvalidParameter or Unreadable where that is wrong."""

    def __init__(self, name: str, text: bytes, random: Random) -> None:
        self._random = random
        self._text = text
        self._lines = text.splitlines(keepends=True)
        self._bytes = Mutator([text], random)
        self._folder = tempfile.TemporaryDirectory(prefix="zmqserve-fuzz-", dir=MEMORY if MEMORY.is_dir() else None)
        self.path = Path(self._folder.name) / name

    def read(self) -> None:
        """Read `path`."""
        raise NotImplementedError

    def draw(self) -> Input:
        """As Target says: the whole file."""
        random = self._random
        dice = random.random()
        if dice < 0.0002:
            return (self._text + random.choice(HEAVY),)
        if dice < 0.5:
            return (self._bytes.change(self._text),)
        lines = random.choices(self._lines, k=random.randrange(1, 12))
        place = random.randrange(len(lines))
        parts = lines[place].partition(b"=")
        lines[place] = b"".join((parts[0], parts[1], random.choice(WORDS), random.choice((parts[2], b"\n"))))
        return (b"".join(lines),)

    def feed(self, given: Input) -> None:
        """As Target says."""
        (data,) = given
        self.path.write_bytes(data)
        with suppress(InvalidParameter, Unreadable):
            self.read()

    def check(self) -> None:
        """Nothing is kept."""

    def finish(self) -> None:
        """As Target says."""
        self._folder.cleanup()


class ConfigTarget(FileTarget):
    """A controller's settings."""

    def __init__(self, random: Random) -> None:
        super().__init__("controller.toml", CONFIG, random)

    def read(self) -> None:
        """As FileTarget says."""
        load_config(self.path)


class RulesTarget(FileTarget):
    """What keys may do."""

    def __init__(self, random: Random) -> None:
        super().__init__("access.toml", RULES.encode(), random)

    def read(self) -> None:
        """As FileTarget says."""
        load_rules(self.path)


class PublicKeyTarget(FileTarget):
    """A key that is allowed."""

    def __init__(self, random: Random) -> None:
        super().__init__("alice.key", CERTIFICATE, random)

    def read(self) -> None:
        """As FileTarget says."""
        read_public(self.path)


class PairTarget(FileTarget):
    """A pair of keys, in a file that only its owner may read."""

    def __init__(self, random: Random) -> None:
        super().__init__("alice.key_secret", CERTIFICATE + b'    secret-key = "JTKVSB%%)wK0E.X)V>+}o?pNmC{O&4W4b!Ni{Lh6"\n', random)
        self.path.touch(0o600)

    def read(self) -> None:
        """As FileTarget says."""
        read_pair(self.path)


TEXTS: dict[str, NewTarget] = {
    "config file": ConfigTarget,
    "rules file": RulesTarget,
    "public key file": PublicKeyTarget,
    "key pair file": PairTarget,
}
