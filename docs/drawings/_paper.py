"""Shared by the drawings: a light and a dark version, their colours, and files that come out the same every time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Palette(NamedTuple):
    """Colours of one version: what is kept, what is dropped, text, thin lines, and a second hue."""

    kept: str
    dropped: str
    ink: str
    line: str
    other: str


PALETTES = {
    "light": Palette("#0f766e", "#cbd5e1", "#334155", "#e2e8f0", "#c2410c"),
    "dark": Palette("#2dd4bf", "#475569", "#cbd5e1", "#3b4252", "#fb923c"),
}
STYLE = {
    "svg.hashsalt": "batchtrim",
    "svg.fonttype": "none",  # text stays text: small, sharp and searchable
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica Neue", "Helvetica", "Arial", "Liberation Sans", "DejaVu Sans", "sans-serif"],
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(name: str, figure: Callable[[Palette], Any], folder: Path) -> list[Path]:
    """Draw ``name-light.svg`` and ``name-dark.svg`` into ``folder``, each on a transparent ground."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    paths = []
    for version, palette in PALETTES.items():
        ink = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), palette.ink)
        with plt.rc_context({**STYLE, **ink, "axes.edgecolor": palette.dropped}):
            made = figure(palette)
            paths.append(folder / f"{name}-{version}.svg")
            made.savefig(paths[-1], transparent=True, metadata={"Date": None, "Creator": None})
            plt.close(made)
    return paths
