"""The settings of one run: frozen, checked, and hashed into the key that names the run.

The definitions do not need torch, so the command line's help, derived from them, is quick; the checks import torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from batchtrim._checks import (
    check_choice,
    check_count,
    check_fraction,
    check_keep,
    check_number,
    check_positive,
    describe,
    nearest,
    plain,
)
from batchtrim.lab.run.settings import Role, Setting, setting, settings_of
from batchtrim.lab.task.names import AUGMENTS, MODELS, NORMS, SPECS, Spec, find_spec, known_as

if TYPE_CHECKING:
    from batchtrim.lab.methods.spec import MethodSpec
    from batchtrim.lab.task.models import ModelRow

OPTIMIZERS = ("adam", "adamw", "sgd", "nesterov")
LR_SCHEDULES = ("constant", "step", "cosine", "onecycle", "triangle")
TEST_VIEWS = ("plain", "mirror")
SCHEDULES = ("linear", "cosine", "step", "constant")
ENGINES = ("exact", "two_pass", "shared", "auto")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true")
DEVICES = ("auto", "cpu", "cuda", "mps")

# Default learning rate and weight decay of each optimizer: common values.
OPTIMIZER_DEFAULTS = {"adam": (1e-3, 0.0), "adamw": (1e-3, 0.05), "sgd": (0.1, 5e-4), "nesterov": (0.1, 5e-4)}


def _by_optimizer(place: int) -> str:
    """Return the optimizers' defaults, grouped by value."""
    together: dict[float, list[str]] = {}
    for name, values in OPTIMIZER_DEFAULTS.items():
        together.setdefault(values[place], []).append(name)
    return ", ".join(f"{' and '.join(names)} {value:g}" for value, names in together.items())


@dataclass(frozen=True)
class RunConfig:
    """The settings of one run. None stands for a default that :meth:`resolved` fills in.

    Each field defines its help, its choices and its role: see :mod:`batchtrim.lab.run.settings`.
    ``label_noise`` is none, symmetric:RATE, asymmetric:RATE or human:WHICH. Under the ``constant`` schedule
    ``keep_end`` applies throughout. ``data_version`` is a hash of the user's own images, so that runs on other images
    are different runs; "" if not yet computed.
    """

    dataset: str = setting(
        "digits", "data set", role=Role.DATA, choices=SPECS, many=True,
        own="a folder, a table, owner/name",
    )  # fmt: skip
    image_size: int | None = setting(
        None, "resize your images to squares of this many pixels", role=Role.DATA, later=True,
        default_help="64, unless all have one small size",
    )  # fmt: skip
    test_split: float | None = setting(
        None, "fraction of your images to test on, if there is no test split", role=Role.DATA, later=True,
        default_help="none",
    )  # fmt: skip
    split_seed: int = setting(0, "seed of the test split", role=Role.DATA, later=True)
    group: str | None = setting(
        None, "column or file-name pattern; images with one value stay on one side of the split", role=Role.DATA,
        later=True, default_help="none",
    )  # fmt: skip
    image_column: str | None = setting(
        None, "column with the images", role=Role.DATA, later=True,
        default_help="image, img, path, file, file_name or filename",
    )  # fmt: skip
    label_column: str | None = setting(
        None, "column with the classes", role=Role.DATA, later=True,
        default_help="label, labels, class, target, fine_label or coarse_label",
    )  # fmt: skip
    skip_broken: bool = setting(
        False, "skip images that cannot be decoded", role=Role.DATA, later=True, default_help="refused"
    )
    data_version: str = setting("", role=Role.DATA, later=True)
    model: str = setting("mlp", "network", choices=MODELS, many=True, own="FILE.py:FUNCTION, hf:ARCHITECTURE")
    width: int | None = setting(None, "channels of the network's first stage", default_help="by network")
    norm: str = setting("batch", "normalisation layers", choices=NORMS)
    method: str = setting("full", role=Role.ARM, many=True)
    method_params: Mapping[str, Any] = setting(dict, role=Role.ARM)
    optimizer: str = setting("adam", "optimizer", choices=OPTIMIZERS, many=True)
    lr: float | None = setting(None, "peak learning rate", default_help=_by_optimizer(0))
    lr_schedule: str = setting("cosine", "schedule of lr", choices=LR_SCHEDULES, many=True)
    weight_decay: float | None = setting(None, "weight decay", default_help=_by_optimizer(1))
    momentum: float = setting(0.9, "momentum of sgd and nesterov")
    epochs: int = setting(10, "epochs of each run")
    batch_size: int = setting(128, "images in a batch, over all processes")
    seed: int = setting(0, role=Role.SEED)
    augment: str | None = setting(None, "augmentation", choices=AUGMENTS, default_help="by data set")
    label_smoothing: float = setting(0.0, "label smoothing; samples are ranked by the loss without it", later=True)
    test_views: str = setting("plain", "views of each test image", choices=TEST_VIEWS, later=True)
    train_size: int | None = setting(
        None, "number of training images, in the classes' proportions", role=Role.DATA, default_help="all"
    )
    test_size: int | None = setting(
        None, "number of test images, the same ones in every run", later=True, default_help="all"
    )
    label_noise: str = setting(
        "none", "wrong labels: none, symmetric:RATE, asymmetric:RATE, human:WHICH", role=Role.DATA
    )
    imbalance: float = setting(1.0, "size of the largest class divided by that of the smallest", role=Role.DATA)
    keep_start: float | None = setting(1.0, "fraction of each batch kept at the start", role=Role.ARM, many=True)
    keep_end: float | None = setting(0.2, "fraction of each batch kept at the end", role=Role.ARM, many=True)
    schedule: str | None = setting("linear", "keep schedule", role=Role.ARM, choices=SCHEDULES, many=True)
    engine: str = setting("exact", "how a trimmed step is computed", role=Role.ARM, choices=ENGINES, many=True)
    precision: str = setting("32-true", "number format", choices=PRECISIONS)
    device: str = setting("auto", "device to train on", choices=DEVICES)
    eval_every: int = setting(1, "epochs between tests; the last epoch is always tested", role=Role.SPEED)
    threads: int = setting(1, "threads of each run", role=Role.SPEED, default_help="cores / workers")

    def resolved(self) -> RunConfig:
        """Return the run with every default filled in and every setting checked.

        Settings without effect (the keep schedule of ``full``) are set to None, so that equal runs have equal keys.

        Raises:
            ValueError, TypeError: a setting is out of range, or its name is unknown.
        """
        from batchtrim.lab.methods.table import find_method
        from batchtrim.lab.task import images, own_models
        from batchtrim.lab.task.models import find_model

        self._check_words()
        own = images.is_own(self.dataset)
        spec = None if own else find_spec(self.dataset)
        model = find_model(self.model)
        images.check_options(self)
        method = find_method(self.method)
        filled = replace(
            self,
            dataset=images.one_spelling(self.dataset),
            model=own_models.one_spelling(self.model),
            augment=self.augment or (spec.augment if spec else "none"),
            schedule=self.schedule or "linear",
        )
        for each in SETTINGS.values():
            if each.choices is not None and not each.own:
                check_choice(each.name, getattr(filled, each.name), each.choices)
        self._check_numbers(spec, model)
        lr, weight_decay = OPTIMIZER_DEFAULTS[self.optimizer]
        lr = lr if self.lr is None else check_positive("lr", self.lr)
        weight_decay = weight_decay if self.weight_decay is None else check_number("weight_decay", self.weight_decay)
        if not 0.0 <= weight_decay < math.inf:
            raise ValueError(f"expected `weight_decay` to be at least 0 and finite, got {weight_decay:g}.")
        check_fraction("label_smoothing", self.label_smoothing)
        if self.label_smoothing and not method.smoothing:
            raise ValueError(
                f"expected `label_smoothing` 0 with method '{self.method}', got {self.label_smoothing:g}. "
                "It derives a probability from the loss, which smoothing changes."
            )
        device = resolve_device(self.device)
        if device == "cpu" and self.precision == "16-mixed":
            raise ValueError(
                "expected another `precision` on a CPU, got '16-mixed', which Lightning replaces. Pass bf16-mixed."
            )
        params = method.check_params(self.method_params)
        if self.engine != "exact" and not method.any_engine:
            raise ValueError(
                f"expected `engine` to be 'exact' for method '{self.method}', got {self.engine!r}. "
                "Its rule needs more than the losses of the current batch."
            )
        return replace(
            filled,
            width=self.width or model.width,
            norm=self.norm if model.uses_norm else "batch",
            method_params=params,
            lr=lr,
            weight_decay=float(weight_decay),
            momentum=self.momentum if self.optimizer in ("sgd", "nesterov") else 0.0,
            device=device,
            imbalance=float(self.imbalance),
            **keep_schedule(filled, method),
        )

    def _check_words(self) -> None:
        """Check the types of settings without a list of choices."""
        for name in ("dataset", "group", "image_column", "label_column", "skip_broken"):
            value, kind = getattr(self, name), SETTINGS[name].kind
            if name == "dataset" and isinstance(value, str) and not value.strip():
                raise ValueError("expected the name of a data set, or the path of one, got nothing.")
            if not isinstance(value, kind) and (value is not None or SETTINGS[name].default is not None):
                what = "text" if kind is str else "true or false"
                raise TypeError(f"expected `{name}` to be {what}, got {describe(value)}.")

    def _check_numbers(self, spec: Spec | None, model: ModelRow) -> None:
        """Check counts, sizes and fractions individually."""
        from batchtrim.lab.task.conditions import parse_label_noise

        parse_label_noise(self.label_noise)
        for name in ("epochs", "batch_size", "eval_every", "threads"):
            check_count(name, getattr(self, name))
        check_count("seed", self.seed, minimum=0)
        if self.width is not None:
            check_count("width", self.width)
            if model.width is None:
                raise ValueError(f"expected no `width` for {self.model!r}, which sets its own, got {self.width}.")
        for name in ("train_size", "test_size"):
            if getattr(self, name) is not None:
                least = spec.classes if spec else 2
                check_count(name, getattr(self, name), minimum=least, hint="At least one image per class.")
        for name in ("keep_start", "keep_end"):  # a method may ignore them, but a wrong number is an error
            if getattr(self, name) is not None:
                check_keep(name, getattr(self, name))
        if not 1.0 <= check_number("imbalance", self.imbalance) < math.inf:
            raise ValueError(
                f"expected `imbalance` to be at least 1 and finite, got {self.imbalance:g}. It is largest / smallest."
            )
        if not 0.0 <= check_number("momentum", self.momentum) < 1.0:
            raise ValueError(f"expected `momentum` in [0, 1), got {self.momentum:g}.")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; settings added later are included only if they differ from the default."""
        values = asdict(replace(self, method_params=dict(self.method_params)))
        return {
            name: value for name, value in values.items() if not SETTINGS[name].later or value != SETTINGS[name].default
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """Make a config from plain values; an unknown name raises an error that suggests the nearest one."""
        for name in values:
            if name not in SETTINGS:
                hint = nearest(name, SETTINGS) or f" Settings are {', '.join(SETTINGS)}."
                raise ValueError(f"expected a setting of a run, got {name!r}.{hint}")
        return cls(**{name: plain(value) for name, value in values.items()})

    @property
    def key(self) -> str:
        """A short hash that names the run: equal for equal settings, whatever the number of threads."""
        values = {name: value for name, value in self.to_dict().items() if SETTINGS[name].in_key(value)}
        return short_hash(without_places(values))

    @property
    def label(self) -> str:
        """A short description for progress lines."""
        return f"{known_as(self.dataset)} {known_as(self.model)} {arm_label(self)} seed {self.seed}"


SETTINGS: Mapping[str, Setting] = settings_of(RunConfig)
ARM_SETTINGS = tuple(name for name, each in SETTINGS.items() if each.role is Role.ARM)
"""Settings that make an arm of a comparison."""
COMPARED = tuple(name for name, each in SETTINGS.items() if each.role in (Role.ARM, Role.SEED, Role.SPEED))
"""Settings in which runs of one comparison may differ; all others make its group."""


def without_places(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as runs are told apart by them: own images and programs by name, wherever they lie.

    Images of one name are told apart by ``data_version``, programs by the version that each run records. The place of
    images without a version stays.
    """
    named = ("model", "dataset") if settings.get("data_version") else ("model",)
    return {**settings, **{name: known_as(settings[name]) for name in named if isinstance(settings.get(name), str)}}


def keep_schedule(config: Any, method: MethodSpec) -> dict[str, Any]:
    """Return the settings of a run's keep schedule, checked; all None if its method has none."""
    if not method.uses_schedule:
        return {"keep_start": None, "keep_end": None, "schedule": None}
    return {
        "keep_start": check_keep("keep_start", 1.0 if config.keep_start is None else config.keep_start),
        "keep_end": check_keep("keep_end", 0.2 if config.keep_end is None else config.keep_end),
        "schedule": check_choice("schedule", config.schedule or "linear", SCHEDULES),
    }


def short_hash(values: Mapping[str, Any]) -> str:
    """Return the hash of settings that names a run."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def arm_label(config: Any) -> str:
    """Return a run's method, its parameters and its keep schedule, for progress lines."""
    params = ",".join(f"{name}={value}" for name, value in config.method_params.items())
    keep = ""
    if config.keep_start and config.keep_end:
        keep = f" {config.schedule} {config.keep_start:g}-{config.keep_end:g}"
    return f"{config.method}{f'({params})' if params else ''}{keep}"


def resolve_device(device: str) -> str:
    """Resolve ``auto`` to the first available of cuda, mps and cpu; an absent device is an error."""
    import torch

    check_choice("device", device, DEVICES)
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(name for name, found in there.items() if found)
    if not there[device]:
        found = ", ".join(name for name, is_there in there.items() if is_there)
        raise ValueError(f"expected `device` to be one this machine has ({found}), got {device!r}.")
    return device
