"""`zmqserve` as a child of a benchmark: it ends with its parent however that ends, and may carry a planted bug.

python -m bench.chaos_child PARENT_PID PLANT zmqserve-arguments...
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from zmqserve import cli, up

from . import chaos_plants

_PR_SET_PDEATHSIG = 1
"""Of `prctl(2)`."""


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when `parent` dies, also when it is stopped; where it can't, watch for it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before
            raise SystemExit(f"process {parent}, which started this one, is gone")
    else:
        up.exit_with_parent(parent)


def main() -> int:
    """Run the command."""
    parent, plant, *arguments = sys.argv[1:]
    end_with_parent(int(parent))
    chaos_plants.plant(plant)
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
