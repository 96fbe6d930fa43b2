"""One process of load: threads that each hold a stream open with the blocking Client, and check what they are given.

    python -m bench.chaos_client --help

Started by the chaos suite, which reads a record of each request from standard output and writes words to standard input:
`poison` asks for an answer that kills workers; `stop`, or the end of input, lets open streams finish and opens no more.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from itertools import count
from random import Random

from zmqserve import Client
from zmqserve.errors import ZmqserveError

from .chaos_child import end_with_parent
from .chaos_oracle import Oracle
from .chaos_records import Begun, Ended, Record, line

PAUSE_S = 0.2
"""What a caller waits that was given an error, before it asks something new."""
MESSAGE_CHARACTERS = 200
"""Of an error's message that are told: a record fits into one atomic write."""


class Load:
    """Streams of one Client, each in a thread of its own."""

    def __init__(self, client: Client, args: argparse.Namespace) -> None:
        self.client = client
        self.args = args
        self.stopping = threading.Event()
        self._numbers = count()

    def __repr__(self) -> str:
        return f"Load({self.client!r}, {self.args.streams} streams)"

    def keep_open(self, number: int) -> None:
        """One thread's life: a stream after the other."""
        random = Random(f"{self.args.seed}/{number}")
        while not self.stopping.is_set():
            words = [f"w{random.randrange(10_000)}" for _ in range(random.randint(5, 40))]
            if not self.ask(words):
                self.stopping.wait(PAUSE_S)

    def poison(self, number: int) -> None:
        """Ask for what kills workers: at its first token, or after some."""
        words = ["poison"] * Random(f"{self.args.seed}/poison/{number}").choice((0, 3, 40)) + ["!die"]
        self.ask(words, poison=True)

    def ask(self, words: list[str], *, poison: bool = False) -> bool:
        """Stream one answer and tell what became of it; returns whether it came whole."""
        args = self.args
        request = next(self._numbers)
        oracle = Oracle(words, args.tokens)
        began_s = time.monotonic()
        tell(Begun(request, began_s, began_s + args.deadline, poison))
        ended = Ended(request, 0.0)
        try:
            self._read(words, oracle, ended)
        except ZmqserveError as error:
            ended.code, ended.error, ended.retryable = error.code, type(error).__name__, error.retryable
            ended.message = str(error)[:MESSAGE_CHARACTERS]
        ended.at_s = time.monotonic()
        ended.wrong = oracle.wrong[:MESSAGE_CHARACTERS]
        ended.tokens = oracle.seen
        tell(ended)
        return ended.code == 0

    def _read(self, words: list[str], oracle: Oracle, ended: Ended) -> None:
        stream = self.client.generate("echo", " ".join(words), max_tokens=self.args.tokens, timeout_s=self.args.deadline)
        last_s = None
        for chunk in stream:
            now = time.monotonic()
            if last_s is not None:
                ended.gap_s = max(ended.gap_s, now - last_s)
                if stream.resumed > ended.resumed:
                    ended.join_gaps_s.append(now - last_s)
            ended.resumed = stream.resumed
            last_s = now
            oracle.chunk(chunk.seq, chunk.text, chunk.token_ids)
        whole = stream.completion
        oracle.end(whole.text, whole.token_ids, whole.finish_reason, (whole.usage.prompt_tokens, whole.usage.completion_tokens))


def tell(record: Record) -> None:
    """Write a record to the harness."""
    os.write(sys.stdout.fileno(), line(record))


def main() -> None:
    """Run until told to stop and all streams have ended."""
    parser = argparse.ArgumentParser(prog="python -m bench.chaos_client", description=__doc__)
    parser.add_argument("--parent", type=int, required=True, help="process id of the harness: this one ends with it")
    parser.add_argument("--controller", action="append", required=True, help="client side of each controller")
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True, help="of each answer")
    parser.add_argument("--deadline", type=float, required=True, help="of each request, in seconds")
    parser.add_argument("--retries", type=int, required=True)
    parser.add_argument("--seed", required=True)
    args = parser.parse_args()
    end_with_parent(args.parent)
    with Client(args.controller, retries=args.retries, name=f"chaos {args.seed}") as client:
        load = Load(client, args)
        threads = [threading.Thread(target=load.keep_open, args=(number,)) for number in range(args.streams)]
        for thread in threads:
            thread.start()
        for number, word in enumerate(sys.stdin):
            if word.strip() == "stop":
                break
            threads.append(threading.Thread(target=load.poison, args=(number,)))
            threads[-1].start()
        load.stopping.set()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
