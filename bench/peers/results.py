"""What was measured, block by block, and the table of it."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

from bench.result import table

ROLES = ("broker", "worker", "client")
UNITS = {"requests": "requests/s", "embed": "vectors/s", "embed_fast_json": "vectors/s"}


class Block(NamedTuple):
    """One block of one peer. value: a rate per second, or the median delay in ms; p99_ms: of delays. made: tokens, answers or vectors.

    cpu_s: CPU seconds of each role during `wall_s`, opening included.
    """

    value: float
    p99_ms: float
    wall_s: float
    made: int
    cpu_s: dict[str, float]


class Results:
    """By workload and peer. `skipped`: why a peer is not there."""

    def __init__(self, skipped: dict[str, str]) -> None:
        self._blocks: dict[str, dict[str, list[Block]]] = {}
        self.skipped = skipped

    def add(self, workload: str, peer: str, block: Block) -> None:
        """One more."""
        self._blocks.setdefault(workload, {}).setdefault(peer, []).append(block)

    def blocks(self, workload: str, peer: str) -> list[Block]:
        """Of one peer; empty when it has none."""
        return self._blocks.get(workload, {}).get(peer, [])

    def median(self, workload: str, peer: str) -> float | None:
        """Of the blocks' values."""
        blocks = self.blocks(workload, peer)
        return statistics.median(block.value for block in blocks) if blocks else None

    def figures(self) -> dict[str, dict[str, dict[str, Any]]]:
        """All of it, for a machine to read."""
        return {workload: {peer: _figures(workload, blocks) for peer, blocks in by.items()} for workload, by in self._blocks.items()}

    def raw(self) -> dict[str, dict[str, list[dict[str, Any]]]]:
        """Every block."""
        return {
            workload: {peer: [block._asdict() for block in blocks] for peer, blocks in by.items()} for workload, by in self._blocks.items()
        }

    def show(self) -> None:
        """Print the tables."""
        for workload, by in self.figures().items():
            header: tuple[str, ...]
            rows: list[tuple[str, ...]] = []
            if workload.startswith("paced"):
                header = (f"{workload}, ms", "p50", "p99", "p99 max", "broker %")
                keys = ("p50_ms", "p99_ms", "p99_max_ms", "broker_percent")
                rows = [(peer, *(f"{each[key]:.2f}" for key in keys)) for peer, each in by.items()]
            else:
                header = (f"{workload}, {UNITS.get(workload, 'tokens/s')}", "median", "min..max", *(f"{role} CPU s/1M" for role in ROLES))
                for peer, each in by.items():
                    costs = (f"{each['cpu_s_per_1m'][role]:.2f}" for role in ROLES)
                    rows.append((peer, f"{each['median']:,}", f"{each['min']:,}..{each['max']:,}", *costs))
            print(table(header, rows) + "\n")
        for peer, why in self.skipped.items():
            print(f"left out: {peer}: {why}")


def _figures(workload: str, blocks: list[Block]) -> dict[str, Any]:
    values = [block.value for block in blocks]
    if workload.startswith("paced"):
        shares = [100 * block.cpu_s.get("broker", 0.0) / block.wall_s for block in blocks]
        return {
            "p50_ms": round(statistics.median(values), 3),
            "p99_ms": round(statistics.median(block.p99_ms for block in blocks), 3),
            "p99_max_ms": round(max(block.p99_ms for block in blocks), 3),
            "broker_percent": round(statistics.median(shares), 2),
        }
    made = sum(block.made for block in blocks)
    costs = {role: round(sum(block.cpu_s.get(role, 0.0) for block in blocks) / made * 1e6, 2) for role in ROLES}
    return {
        "median": round(statistics.median(values)),
        "min": round(min(values)),
        "max": round(max(values)),
        "cpu_s_per_1m": costs,
    }
