"""Warnings about settings before the first run."""

from __future__ import annotations

from typing import Any

import pytest

from batchtrim.lab.execute import grid
from batchtrim.lab.execute.preflight import warnings_for


def said(**settings: Any) -> str:
    return "\n".join(warnings_for(settings, grid.expand(settings)))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seeds": [1, 1]}, "seeds: 1 is given more than once"),
        ({"methods": ["full", "full", "trim"]}, "methods: full is given more than once"),
        (
            {"methods": ["full", "focal"], "keep_end": 0.2},
            "keep_end: without effect, since no method here has a keep schedule",
        ),
        ({"methods": ["trim"], "keep_start": 0.2, "keep_end": 0.8}, "keep_start 0.2 is below keep_end 0.8"),
        ({"methods": ["trim"], "schedule": "constant", "keep_start": 0.9}, "keep_start 0.9: without effect"),
        (
            {"methods": ["trim"], "schedule": ["constant", "linear"], "keep_start": 0.5, "keep_end": [0.5, 0.2]},
            "trim constant 0.5-0.5 and trim linear 0.5-0.5: they keep the same in every epoch, and are run",
        ),
        ({"lr": 1e9}, "lr 1e+09: hardly any network learns"),
        ({"momentum": 0.5}, "momentum 0.5: without effect with optimizer adam"),
        ({"norm": "group", "model": ["mlp", "vit"]}, "norm group: without effect with model mlp, vit"),
        (
            {"methods": ["full", "trim"], "epochs": 1},
            "epochs 1: a schedule moves between epochs, so keep",
        ),
        ({"methods": ["small_loss"], "epochs": 1}, "small_loss: with epochs 1 the dropped fraction rises to 0, not to"),
        (
            {"methods": ["small_loss"], "epochs": 6, "params": {"small_loss": {"noise_rate": [0.1, 0.2]}}},
            "small_loss: with epochs 6 the dropped fraction rises to 0.1, not to noise_rate 0.2, because of",
        ),
        ({"methods": ["loss_drop"], "epochs": 1}, "loss_drop: with epochs 1 it keeps all samples throughout"),
        (
            {"methods": ["data_dropout"], "epochs": 3, "params": {"data_dropout": {"last": 3}}},
            "data_dropout: with epochs 3 it keeps all samples throughout",
        ),
    ],
)
def test_surprising_settings_are_reported(settings: dict[str, Any], words: str) -> None:
    assert words in said(**settings)


def test_ordinary_settings_say_nothing() -> None:
    assert said(methods=["full", "trim"], seeds=3, keep_start=1.0, keep_end=0.2, lr=0.1) == ""
    assert said(methods=["full", "trim"], schedule=["constant", "linear"], keep_end=[0.2, 0.5]) == ""
    assert said(methods=["small_loss", "loss_drop", "data_dropout"], epochs=11) == ""
    assert said(optimizer=["adam", "sgd"], momentum=0.5, norm="batch") == said(model=["mlp", "cnn"], norm="group") == ""
    assert said(methods=["full", "loss_mass"], epochs=1) == said(methods=["trim"], schedule="constant", epochs=1) == ""


@pytest.mark.parametrize("method", ["full", "focal", "trim"])
def test_a_keep_of_20_is_refused_by_every_method(method: str) -> None:
    with pytest.raises(ValueError, match="keep_end"):
        grid.expand({"methods": [method], "keep_end": 20.0})
