"""What one run is: a frozen record of settings, checked, with a key that names it."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from batchtrim._checks import check_choice, check_count, check_keep, check_number, check_positive
from batchtrim.lab.task.augment import AUGMENTS
from batchtrim.lab.task.conditions import parse_label_noise
from batchtrim.lab.task.data import find_spec
from batchtrim.lab.task.models import NORMS, find_model

OPTIMIZERS = ("adam", "adamw", "sgd", "nesterov")
LR_SCHEDULES = ("constant", "step", "cosine", "onecycle")
SCHEDULES = ("linear", "cosine", "step", "constant")
ENGINES = ("exact", "two_pass", "shared", "auto")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true")
DEVICES = ("auto", "cpu", "cuda", "mps")

# What an optimizer starts from where nothing is said: learning rate and weight decay in common use.
OPTIMIZER_DEFAULTS = {"adam": (1e-3, 0.0), "adamw": (1e-3, 0.05), "sgd": (0.1, 5e-4), "nesterov": (0.1, 5e-4)}

# What does not change what is learnt, only how fast: left out of the key, so that a sweep goes on elsewhere.
NOT_IN_KEY = ("threads",)


@dataclass(frozen=True)
class RunConfig:
    """The settings of one run. None stands for a default that :meth:`resolved` fills in.

    Args:
        dataset: a name in ``batchtrim.lab.task.data.SPECS``; ``model``: one in ``batchtrim.lab.task.models.MODELS``.
        width: channels of the first stage; ``norm``: batch or group.
        method: a row of ``batchtrim.lab.methods.table.METHODS``; ``method_params``: its parameters, where not the
            defaults.
        optimizer: adam, adamw, sgd or nesterov; ``lr``: its peak; ``lr_schedule``: constant, step, cosine, onecycle.
        epochs: over the training set; ``batch_size``: pictures in a batch (over all devices).
        seed: of everything that is drawn.
        augment: none, crop, flip or crop+flip.
        train_size: how many training pictures; None is all.
        label_noise: none, symmetric:RATE, asymmetric:RATE, human:WHICH; ``imbalance``: largest over smallest class.
        keep_start: fraction of a batch kept at the start, for methods that follow the keep schedule; ``keep_end``:
            at the end; ``schedule``: the way between: linear, cosine, step, constant (keep_end throughout).
        engine: which parts of the network dropped samples go through: see ``batchtrim.engine``.
        precision: Lightning Fabric's word for it; ``device``: auto, cpu, cuda, mps; ``threads``: of one run.
    """

    dataset: str = "digits"
    model: str = "mlp"
    width: int | None = None
    norm: str = "batch"
    method: str = "full"
    method_params: Mapping[str, Any] = field(default_factory=dict)
    optimizer: str = "adam"
    lr: float | None = None
    lr_schedule: str = "cosine"
    weight_decay: float | None = None
    momentum: float = 0.9
    epochs: int = 10
    batch_size: int = 128
    seed: int = 0
    augment: str | None = None
    train_size: int | None = None
    label_noise: str = "none"
    imbalance: float = 1.0
    keep_start: float | None = 1.0
    keep_end: float | None = 0.2
    schedule: str | None = "linear"
    engine: str = "exact"
    precision: str = "32-true"
    device: str = "auto"
    threads: int = 1

    def resolved(self) -> RunConfig:
        """The same run with every default written out and every setting checked.

        Settings that play no part are set to None (the keep schedule of ``full``), so that equal runs have equal keys.

        Raises:
            ValueError, TypeError: a setting is out of its range, or no such name is known.
        """
        from batchtrim.lab.methods.table import find_method

        spec, model = find_spec(self.dataset), find_model(self.model)
        check_choice("norm", self.norm, NORMS)
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("lr_schedule", self.lr_schedule, LR_SCHEDULES)
        check_choice("engine", self.engine, ENGINES)
        check_choice("precision", self.precision, PRECISIONS)
        augment = self.augment or spec.augment
        check_choice("augment", augment, AUGMENTS)
        parse_label_noise(self.label_noise)
        for name in ("epochs", "batch_size", "threads"):
            check_count(name, getattr(self, name))
        check_count("seed", self.seed, minimum=0)
        if self.width is not None:
            check_count("width", self.width)
        if self.train_size is not None:
            check_count("train_size", self.train_size, minimum=spec.classes, hint="At least one picture a class.")
        if check_number("imbalance", self.imbalance) < 1.0:
            raise ValueError(
                f"expected `imbalance` to be at least 1, got {self.imbalance:g}. It is largest / smallest."
            )
        lr, weight_decay = OPTIMIZER_DEFAULTS[self.optimizer]
        lr = lr if self.lr is None else check_positive("lr", self.lr)
        weight_decay = weight_decay if self.weight_decay is None else check_number("weight_decay", self.weight_decay)
        if weight_decay < 0:
            raise ValueError(f"expected `weight_decay` to be at least 0, got {weight_decay:g}.")
        if not 0.0 <= check_number("momentum", self.momentum) < 1.0:
            raise ValueError(f"expected `momentum` in [0, 1), got {self.momentum:g}.")
        method = find_method(self.method)
        params = method.check_params(self.method_params)
        if self.engine != "exact" and not method.any_engine:
            raise ValueError(
                f"expected `engine` to be 'exact' for method '{self.method}', got {self.engine!r}. "
                "Its rule needs more than the losses of the batch at hand."
            )
        keep: dict[str, Any] = {"keep_start": None, "keep_end": None, "schedule": None}
        if method.uses_schedule:
            keep = {
                "keep_start": check_keep("keep_start", 1.0 if self.keep_start is None else self.keep_start),
                "keep_end": check_keep("keep_end", 0.2 if self.keep_end is None else self.keep_end),
                "schedule": check_choice("schedule", self.schedule or "linear", SCHEDULES),
            }
        return replace(
            self,
            width=self.width or model.width,
            norm=self.norm if model.uses_norm else "batch",
            method_params=params,
            lr=lr,
            weight_decay=float(weight_decay),
            momentum=self.momentum if self.optimizer in ("sgd", "nesterov") else 0.0,
            augment=augment,
            device=resolve_device(self.device),
            imbalance=float(self.imbalance),
            **keep,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(replace(self, method_params=dict(self.method_params)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """From plain values; a name that is no setting is an error that suggests the nearest one."""
        names = [each.name for each in fields(cls)]
        for name in values:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"Did you mean '{near[0]}'?" if near else f"Settings are {', '.join(names)}."
                raise ValueError(f"expected a setting of a run, got {name!r}. {hint}")
        return cls(**values)

    @property
    def key(self) -> str:
        """Short hash that names the run: equal for equal settings, whatever the number of threads."""
        values = {name: value for name, value in self.to_dict().items() if name not in NOT_IN_KEY}
        text = json.dumps(values, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @property
    def label(self) -> str:
        """A few words for progress lines."""
        params = ",".join(f"{name}={value}" for name, value in self.method_params.items())
        keep = f" {self.schedule} {self.keep_start:g}-{self.keep_end:g}" if self.keep_start and self.keep_end else ""
        return f"{self.dataset} {self.model} {self.method}{f'({params})' if params else ''}{keep} seed {self.seed}"


def resolve_device(device: str) -> str:
    """``auto`` becomes cuda or mps where there is one, else cpu; an absent device is an error."""
    import torch

    check_choice("device", device, DEVICES)
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(name for name, found in there.items() if found)
    if not there[device]:
        found = ", ".join(name for name, is_there in there.items() if is_there)
        raise ValueError(f"expected `device` to be one this machine has ({found}), got {device!r}.")
    return device
