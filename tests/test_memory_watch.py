"""The memory watch: what it takes for the limit, and that it sees what the process holds."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from zmqserve import memory
from zmqserve.memory import LOOK_S, SHARE, MemoryWatch, default_limit_bytes, memory_exceeded

MIB = 2**20


def test_it_sees_what_is_held() -> None:
    watch = MemoryWatch(2**50)
    before = watch.held_bytes()
    assert abs(before - psutil.Process().memory_info().rss) < 8 * MIB
    held = bytearray(b"x") * (64 * MIB)
    assert watch.held_bytes() - before > 48 * MIB
    del held
    watch.close()


def test_over_the_limit_it_tells_how_much_and_under_it_nothing() -> None:
    low, high = MemoryWatch(MIB), MemoryWatch(2**50)
    assert low.look(0.0) > MIB
    assert high.look(0.0) == 0
    low.close()
    high.close()


def test_it_looks_now_and_then_only() -> None:
    watch = MemoryWatch(MIB)
    assert watch.look(10.0)
    assert watch.look(10.0 + LOOK_S / 2) == 0
    assert watch.look(10.0 + LOOK_S)
    watch.close()


def test_zero_turns_it_off() -> None:
    watch = MemoryWatch(0)
    assert watch.look(0.0) == 0
    watch.close()


def test_without_proc_the_peak_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_STATM", "/nowhere")
    watch = MemoryWatch(2**50)
    assert watch.held_bytes() >= 0.5 * psutil.Process().memory_info().rss
    watch.close()


def group(root: Path, line: str, **files: str) -> int:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(line)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name.replace("__", "/").replace("_max", ".max").replace("_limit", ".limit_in_bytes")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return default_limit_bytes(root)


def test_the_default_is_a_share_of_the_machine(tmp_path: Path) -> None:
    assert default_limit_bytes(tmp_path) == int(SHARE * psutil.virtual_memory().total)


def test_or_of_the_least_bound_of_a_control_group_above(tmp_path: Path) -> None:
    assert group(tmp_path, "0::/a/b\n", a__b__memory_max="max\n", a__memory_max=f"{100 * MIB}\n") == int(SHARE * 100 * MIB)


def test_also_in_a_container_that_sees_its_group_as_the_root(tmp_path: Path) -> None:
    assert group(tmp_path, "0::/\n", memory_max=f"{100 * MIB}\n") == int(SHARE * 100 * MIB)


def test_and_of_version_1(tmp_path: Path) -> None:
    lines = "4:memory:/one\n1:cpu:/\n0::/\n"
    assert group(tmp_path, lines, memory__one__memory_limit=f"{100 * MIB}", memory__memory_limit=str(2**63 - 4096)) == int(
        SHARE * 100 * MIB
    )


def test_groups_that_are_out_of_view_bound_nothing(tmp_path: Path) -> None:
    assert group(tmp_path, "0::/../../gone\n") == int(SHARE * psutil.virtual_memory().total)


def test_the_error_tells_both_numbers_and_the_setting() -> None:
    error = memory_exceeded(300 * MIB, 200 * MIB)
    assert error.code == 50406
    assert "300 MiB" in error.message
    assert "200 MiB (memory_bytes)" in error.message
