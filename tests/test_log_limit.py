"""A peer that does the same over and over does not fill the log."""

from __future__ import annotations

from typing import Any

from zmqserve.loglimit import MOST_ALIKE, MOST_KINDS, WINDOW_S, LogLimit


def limited() -> tuple[LogLimit, list[tuple[str, dict[str, Any]]]]:
    lines: list[tuple[str, dict[str, Any]]] = []
    return LogLimit(lambda event, **fields: lines.append((event, fields)), 0.0), lines


def test_lines_alike_are_counted_beyond_the_first_ones() -> None:
    limit, lines = limited()
    for number in range(1000):
        limit("worker refused", why=f"reason {number}")
    assert len(lines) == MOST_ALIKE
    limit.tick(WINDOW_S / 2)
    limit("worker refused", why="still")
    assert len(lines) == MOST_ALIKE
    limit.tick(WINDOW_S)
    assert lines[MOST_ALIKE:] == [("log lines left out", {"level": "warning", "of": "worker refused", "lines": 1001 - MOST_ALIKE})]
    limit("worker refused", why="again")
    assert lines[-1] == ("worker refused", {"why": "again"})


def test_others_are_not_kept_from_theirs() -> None:
    limit, lines = limited()
    for _ in range(1000):
        limit("worker came", worker="noisy")
    for number in range(1000):
        limit("worker came", worker=f"w{number}")
    limit("worker gone", worker="noisy")
    assert len(lines) == MOST_ALIKE + 1000 + 1


def test_ever_new_names_are_bounded_too() -> None:
    limit, lines = limited()
    for number in range(MOST_KINDS + 500):
        limit("worker came", worker=str(number))
    assert len(lines) == MOST_KINDS
    assert len(limit._seen) <= MOST_KINDS
    limit.tick(WINDOW_S)
    assert lines[-1][1]["lines"] == 500


def test_nothing_is_said_when_nothing_was_left_out() -> None:
    limit, lines = limited()
    limit("worker came", worker="w")
    limit.tick(WINDOW_S)
    limit.tick(2 * WINDOW_S)
    assert len(lines) == 1
