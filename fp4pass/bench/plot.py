"""The ratio over tokens as a picture. Needs matplotlib, which the extra ``bench`` of the package brings along."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from fp4pass.bench.table import Run, header
from fp4pass.errors import VersionError

_TITLES = {"dense": "linear layers, BF16 by cuBLAS", "moe": "routed experts, BF16 by transformers, compiled"}


def check_plotting() -> None:
    """Raise VersionError unless matplotlib is installed."""
    if find_spec("matplotlib") is None:
        raise VersionError(
            "a plot needs matplotlib",
            seen="it is not installed",
            expected="matplotlib, which fp4pass needs for nothing else",
            do="pip install matplotlib; a stored run can be plotted anywhere: bench --from FILE --plot FILE",
        )


def plot(run: Run, file: Path) -> None:
    """Write a picture of ``run``: time of BF16 over ours, over tokens, a panel for each kind of case.

    Rows with wrong results are left out. Raises VersionError without matplotlib.
    """
    check_plotting()
    # The figure itself, not pyplot: nothing is kept in the process, and no display is asked for.
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(row.kind for row in run.rows))
    figure = Figure(figsize=(6.4 * max(1, len(kinds)), 4.6), layout="constrained")
    figure.suptitle(header(run.machine), fontsize=8)
    for kind, axes in zip(kinds, figure.subplots(1, len(kinds), squeeze=False)[0], strict=True):
        rows = [row for row in run.rows if row.kind == kind and row.right]
        for name in dict.fromkeys(row.name for row in rows):
            points = sorted((row.tokens, row.ratio) for row in rows if row.name == name)
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_xscale("log", base=2)
        ticks = sorted({row.tokens for row in rows})
        axes.set_xticks(ticks, [str(tokens) for tokens in ticks], fontsize=7)
        axes.set_ylim(bottom=0)
        axes.set(xlabel="tokens", ylabel="time of BF16 / time of fp4pass", title=_TITLES.get(kind, kind))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(file, dpi=150)
