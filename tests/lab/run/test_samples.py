"""The description of a keep log's samples: what a page can show, and what is refused when a task gives it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from batchtrim.lab.run.samples import checked_images, checked_labels, checked_rows
from batchtrim.lab.run.task_config import TaskConfig
from batchtrim.lab.run.task_run import Run


def test_what_a_page_can_show_is_taken_as_it_is() -> None:
    assert checked_rows(["", "<é>", {"a": None}]) == ["", "<é>", {"a": None}]
    pixels = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 2, 2)
    for images in (pixels, pixels.numpy(), list(pixels.numpy())):
        assert np.array_equal(checked_images(images), pixels.numpy())
    for labels in ([0, 1, 1], torch.tensor([0, 1, 1]), np.array([0.0, 1.0, 1.0]), (False, True, np.int8(1))):
        assert checked_labels(labels, "ab") == [0, 1, 1]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"rows": ["a", None]}, "expected `rows` to be texts or mappings of fields, got None in row 1."),
        ({"rows": [1, 2]}, "got 1 in row 0"),
        ({"images": torch.rand(2, 1, 4, 4)}, r"dtype float32. From 0 to 1: \(255 \* images\)"),
        (
            {"images": torch.zeros(2, 4, 4, 3, dtype=torch.uint8)},
            r"got .*\(2, 4, 4, 3\).* images.permute\(0, 3, 1, 2\)",
        ),
        ({"images": torch.zeros(2, 4, 4, dtype=torch.uint8)}, r"Of one channel: images.unsqueeze\(1\)"),
        ({"images": torch.zeros(2, 2, 4, 4, dtype=torch.uint8)}, r"with 1 or 3 channels C, got"),
        ({"labels": ["x", "y"], "classes": "xy"}, "whole numbers from 0, got 'x' for sample 0. Names belong in"),
        ({"labels": [0, 1.7], "classes": "xy"}, "got 1.7 for sample 1"),
        ({"labels": [0, -1], "classes": "xy"}, "expected `labels` from 0 to 1, as `classes` has 2 names, got -1"),
        ({"labels": torch.tensor([0, 2]), "classes": "xy"}, "got 2 for sample 1"),
    ],
)
def test_what_no_page_can_show_is_refused_in_the_run(given: dict[str, Any], says: str, tmp_path: Path) -> None:
    """Float images, channels last and a label of -1 gave a wrong page; the others an error without a name."""
    run = Run(TaskConfig(task="t.py:train", method="trim").resolved(), tmp_path)
    run.keep_log(2)
    with pytest.raises((ValueError, TypeError), match=says):
        run.show(**{"rows": ["a", "b"]} | given if "images" not in given else given)
