"""A client program for tests to kill: `python -m tests.streaming_client ENDPOINT STREAMS`. It says "streaming" when all its streams do."""

from __future__ import annotations

import os
import sys
import time

from zmqserve import Client

PINGED_S = 1.1
"""By then it has Pinged, so that its controller knows how long it may be silent."""


def main(endpoint: str, count: int) -> None:
    with Client(endpoint) as client:
        streams = [client.generate("m", "a b c", max_tokens=1_000_000) for _ in range(count)]
        began_s = time.monotonic()
        said = False
        while True:
            for stream in streams:
                next(stream)
            if not said and time.monotonic() - began_s > PINGED_S:
                said = True
                os.write(1, b"streaming\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
