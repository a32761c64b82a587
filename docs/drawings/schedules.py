"""Every schedule as a line: how much of a batch is kept, from the start of training to its end.

python docs/drawings/schedules.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import batchtrim

FOLDER = Path(__file__).parent
# each as one would type it, and what it is asked with
SCHEDULES = {
    "linear(1.0, 0.2)": "progress",
    "cosine(1.0, 0.2)": "progress",
    "constant(0.5)": "progress",
    "step({0.5: 0.6, 0.75: 0.3})": "progress",
    "piecewise({0: 1.0, 0.5: 0.8, 1: 0.2})": "progress",
    "join([constant(1.0), linear()], at=[0.3])": "progress",
    "by_accuracy()": "training accuracy",
    "lambda p: 1.0 if p < 0.9 else 0.4": "progress",
}
POINTS = 201


def typed(text: str) -> Callable[[float], float]:
    """Return the schedule that ``text`` makes."""
    return eval(text, dict(vars(batchtrim.schedules)))  # what stands over a line is what is drawn


def figure(palette: Any) -> Any:
    import matplotlib.pyplot as plt

    made, panels = plt.subplots(4, 2, figsize=(7.6, 8.4), layout="constrained", sharey=True)
    made.get_layout_engine().set(wspace=0.06, hspace=0.06)
    for axes, (title, asked) in zip(panels.flat, SCHEDULES.items(), strict=True):
        places = [point / (POINTS - 1) for point in range(POINTS)]
        keeps = [typed(title)(place) for place in places]
        colour = palette.kept if asked == "progress" else palette.other
        axes.fill_between(places, keeps, color=colour, alpha=0.12, linewidth=0, step="post")
        axes.plot(places, keeps, color=colour, linewidth=2.2, drawstyle="steps-post")
        axes.set_title(title, loc="left", fontfamily="monospace", fontsize=9, color=palette.ink)
        axes.grid(axis="y", color=palette.line, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set(xlim=(0, 1), ylim=(0, 1.05), xlabel=asked)
        axes.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes.set_yticks([0, 0.2, 0.6, 1], ["0", "0.2", "0.6", "1"])
        axes.tick_params(length=0, labelsize=10, pad=5)
    made.supylabel("part of the batch that is kept", fontsize=11, color=palette.ink)
    return made


def main(folder: Path = FOLDER) -> list[Path]:
    from _paper import draw

    return draw("schedules", figure, folder)


if __name__ == "__main__":
    print(*main(), sep="\n")
