"""`python -m zmqserve` is the command `zmqserve`."""

import sys

from .cli import main

sys.exit(main())
