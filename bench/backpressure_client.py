"""A client that opens streams and reads none of them: `python -m bench.backpressure_client --help`.

It says `ready` when its controller answered, opens the streams at the word `go`, says `open`, and then waits to be stopped.
"""

from __future__ import annotations

import argparse
import sys
import time

import zmq

from zmqserve import Client
from zmqserve.messages import Generate, Hello, ListModels, Models, ToClient, decoder, encode
from zmqserve.params import SamplingParams
from zmqserve.requests import new_rid

from .chaos_child import end_with_parent

TOKENS = 10_000_000
"""An answer that does not end."""
PINGED_S = 1.5
"""By then the SDK has sent its first Ping (after 1 s), and is held to what it promised in it."""


def main() -> None:
    """Run until it is killed."""
    parser = argparse.ArgumentParser(prog="python -m bench.backpressure_client", description=__doc__)
    parser.add_argument("--parent", type=int, required=True, help="process id of the harness: this one ends with it")
    parser.add_argument("--controller", required=True, help="its client side")
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--token-characters", type=int, required=True, help="of each token's text")
    parser.add_argument("--raw", action="store_true", help="a bare socket that never Pings, instead of the SDK's Client")
    args = parser.parse_args()
    end_with_parent(args.parent)
    (_raw if args.raw else _sdk)(args.controller, args.streams, "x" * args.token_characters)


def _sdk(endpoint: str, streams: int, prompt: str) -> None:
    with Client(endpoint, connect_timeout_s=30.0) as client:
        client.models()
        _say_and_wait("ready")
        opened = [client.generate("echo", prompt, max_tokens=TOKENS) for _ in range(streams)]
        time.sleep(PINGED_S)
        _say_and_wait("open")
        del opened


def _raw(endpoint: str, streams: int, prompt: str) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.connect(endpoint)
    read = decoder(ToClient).decode
    socket.send(encode(Hello(1)))
    socket.recv()
    _say_and_wait("ready")
    for _ in range(streams):
        socket.send(encode(Generate(new_rid(), "echo", prompt=prompt, params=SamplingParams(max_tokens=TOKENS))))
    socket.send(encode(ListModels(1)))
    while type(read(socket.recv())) is not Models:  # after the streams, which have all arrived then
        pass
    _say_and_wait("open")


def _say_and_wait(word: str) -> None:
    print(word, flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
