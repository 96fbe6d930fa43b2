"""Plots of serving results, as PNG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .report_results import Point

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE_IN = (7.0, 4.2)
DPI = 130
MOST_LINES = 10
"""Of one plot of distributions: more cannot be told apart."""
LEGEND_COLUMNS = 3
MOST_TICKS = 10
"""Of one axis that has one at each value."""

Of = Callable[[Point], float | None]


def draw(points: Sequence[Point], folder: Path) -> list[Path]:
    """All plots that the results have something for, in the folder."""
    closed = [point for point in points if point.rate is None and point.concurrency is not None]
    opened = [point for point in points if point.rate is not None]
    drawn: list[Path] = []
    for some, axis, of in (
        (closed, "concurrency", lambda point: point.concurrency),
        (opened, "rate", lambda point: point.rate),
    ):
        if some:
            drawn.append(_ttft(some, axis, of, folder / f"ttft_{axis}.png"))
            drawn.append(_throughput(some, axis, of, folder / f"throughput_{axis}.png"))
    detailed = [point for point in points if point.pooled("latencies")]
    if detailed:
        drawn.append(_distributions(detailed, folder / "latency_cdf.png"))
    return drawn


def _ttft(points: Sequence[Point], axis: str, of: Of, path: Path) -> Path:
    figure, axes = _figure()
    for number, (name, some) in enumerate(_systems(points, of)):
        _line(axes, some, of, "median_ttft_ms", color=f"C{number}", label=f"{name}, median")
        _line(axes, some, of, "p99_ttft_ms", color=f"C{number}", label=f"{name}, p99", linestyle="--")
    return _written(figure, axes, axis, "time to first token, ms", path, log=True)


def _throughput(points: Sequence[Point], axis: str, of: Of, path: Path) -> Path:
    figure, axes = _figure()
    for number, (name, some) in enumerate(_systems(points, of)):
        _line(axes, some, of, "output_throughput", color=f"C{number}", label=name)
    return _written(figure, axes, axis, "output tokens/s", path, log=False)


def _distributions(points: Sequence[Point], path: Path) -> Path:
    """Which share of requests had at most this latency."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(SIZE_IN[0] * 1.5, SIZE_IN[1]), dpi=DPI, layout="constrained")
    for axes, key, title in zip(figure.subplots(1, 2), ("ttfts", "latencies"), ("time to first token", "end-to-end latency"), strict=True):
        for point in points[:MOST_LINES]:
            values = np.sort(point.pooled(key)) * 1000
            axes.step(values, np.arange(1, len(values) + 1) / max(1, len(values)), where="post", label=f"{point.label}, {point.load}")
        _logarithmic(axes, "x")
        axes.set_xlabel(f"{title}, ms")
        axes.grid(visible=True, alpha=0.25)
    figure.axes[0].set_ylabel("share of requests")
    figure.legend(*axes.get_legend_handles_labels(), fontsize="small", loc="outside lower center", ncols=LEGEND_COLUMNS)
    if len(points) > MOST_LINES:
        figure.suptitle(f"the first {MOST_LINES} of {len(points)} loads", fontsize="small")
    figure.savefig(path)
    return path


def _figure() -> tuple[Any, Axes]:
    # Not pyplot: it keeps every figure until it is told otherwise, and asks for a screen.
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_IN, dpi=DPI, layout="constrained")
    return figure, figure.subplots()


def _systems(points: Sequence[Point], of: Of) -> list[tuple[str, list[Point]]]:
    """Points by label (and model, where one has several), each in the order of the axis."""
    several = {label for label in {point.label for point in points} if len({point.model for point in points if point.label == label}) > 1}
    found: dict[str, list[Point]] = {}
    for point in points:
        found.setdefault(f"{point.label} ({point.model})" if point.label in several else point.label, []).append(point)
    return [(name, sorted(some, key=lambda point: of(point) or 0)) for name, some in found.items()]


def _line(axes: Axes, points: Sequence[Point], of: Of, key: str, **style: Any) -> None:
    """The medians of runs, and from the least to the greatest as a band."""
    found = [(x, spread) for point in points if (x := of(point)) is not None and (spread := point.spread(key)) is not None]
    if not found:
        return
    xs = [x for x, _ in found]
    axes.plot(xs, [spread.median for _, spread in found], marker="o", markersize=4, **style)
    lows, highs = [spread.low for _, spread in found], [spread.high for _, spread in found]
    axes.fill_between(xs, lows, highs, color=style["color"], alpha=0.15, linewidth=0)


def _written(figure: Any, axes: Axes, axis: str, title: str, path: Path, *, log: bool) -> Path:
    _logarithmic(axes, "x")
    xs = sorted({float(x) for line in axes.get_lines() for x in np.asarray(line.get_xdata())})
    if len(xs) <= MOST_TICKS:
        axes.set_xticks(xs, [f"{x:.3g}" for x in xs])
    axes.set_xlabel("requests at once" if axis == "concurrency" else "requests/s asked for")
    if log:
        _logarithmic(axes, "y")
    else:
        axes.set_ylim(bottom=0)
    axes.set_ylabel(title)
    axes.grid(visible=True, alpha=0.25)
    axes.legend(fontsize="small")
    figure.savefig(path)
    return path


def _logarithmic(axes: Axes, which: Literal["x", "y"]) -> None:
    """With ticks at 1, 2, 5, 10, ... as plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_locator(NullLocator())
