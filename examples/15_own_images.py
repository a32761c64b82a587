"""Compare on your own images with your own network: a folder of class folders, with images of several sizes.

    python examples/15_own_images.py [--epochs 20] [--seeds 3]

It draws shapes into a folder, the same number per class and several per "clip", and runs the command for them.
"""

import random
import tempfile
from pathlib import Path

from PIL import Image, ImageDraw
from torch import nn

from _data import command_line
from batchtrim.lab import cli, records

CLIP = 4  # images of one clip look similar, so they have to stay on one side of the split


def build(shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Return the network; ``--model examples/15_own_images.py:build`` calls this."""
    channels, height, width = shape
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(16 * (height // 4) * (width // 4), classes),
    )  # fmt: skip


def draw_images(folder: Path, clips: int) -> None:
    draws = random.Random(0)
    for kind in ("circle", "square", "triangle"):
        (folder / kind).mkdir(parents=True)
        for clip in range(clips):
            side = draws.randint(20, 90)
            paper, ink = draws.sample(("white", "khaki", "tomato", "teal", "navy", "orchid"), 2)
            for frame in range(CLIP):
                image = Image.new("RGB", (side, side + draws.randint(-8, 8)), paper)
                at, size = draws.randint(1, side // 3), side // 2
                brush = ImageDraw.Draw(image)
                if kind == "circle":
                    brush.ellipse((at, at, at + size, at + size), ink)
                elif kind == "square":
                    brush.rectangle((at, at, at + size, at + size), ink)
                else:
                    brush.polygon([(at, at + size), (at + size, at + size), (at + size // 2, at)], ink)
                image.save(folder / kind / f"clip{clip:03}_{frame}.png")


def main(epochs: int = 20, seeds: int = 3, clips: int = 30) -> float:
    with tempfile.TemporaryDirectory() as place:
        folder, out = Path(place, "shapes"), Path(place, "runs")
        draw_images(folder, clips)
        command = [
            "compare", "--dataset", str(folder), "--test-split", "0.25", "--group", r"(\w+)/clip(\d+)_",
            "--image-size", "24", "--model", f"{__file__}:build", "--methods", "full,trim,random", "--batch-size", "32",
            "--seeds", str(seeds), "--epochs", str(epochs), "--lr", "0.003", "--workers", "1", "--out", str(out),
        ]  # fmt: skip
        print("batchtrim", *command)
        cli.app(command, standalone_mode=False)
        errors = [row["test_error"] for row in records.read(out) if row["config"]["method"] == "trim"]
    return 1.0 - sum(errors) / len(errors)


if __name__ == "__main__":
    command_line(main)
