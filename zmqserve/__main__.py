"""`python -m zmqserve` is the command `zmqserve`."""

import sys

try:
    from .cli import main
except KeyboardInterrupt:
    sys.exit(130)

sys.exit(main())
