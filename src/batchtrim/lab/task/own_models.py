"""Networks outside the lab's registry: a function in a file, or an image classifier of transformers.

``my_model.py:build`` is called as ``build(shape, classes)``, with shape (channels, height, width), and returns a
module from images (B, C, H, W) to logits (B, classes). ``hf:ARCHITECTURE`` is built from its configuration with fresh
weights: ``hf:vit``, ``hf:ViTForImageClassification``, with ``:NAME=VALUE`` for each setting that is not its
default, as in ``hf:vit:hidden_size=64:num_hidden_layers=4``, or ``hf:FOLDER`` with a config.json in it.
"""

from __future__ import annotations

import ast
import hashlib
import json
import weakref
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from batchtrim._checks import describe, import_extra, nearest
from batchtrim.lab import process
from batchtrim.lab.files import absolute, expanded
from batchtrim.lab.task.names import known_as
from batchtrim.lab.task.own_code import Code, YourCodeFailed, as_a_program, own_traceback

__all__ = ["build_own", "check_own", "code_of", "is_own_model", "try_own"]

Shape = tuple[int, int, int]

made: weakref.WeakValueDictionary[int, nn.Parameter] = weakref.WeakValueDictionary()
"""The weights, by id, of networks that the user's functions returned and that still exist."""


def is_own_model(name: str) -> bool:
    """True if ``name`` is a function in a file or an architecture of transformers."""
    return name.startswith("hf:") or ".py:" in name


def one_spelling(name: str) -> str:
    """Return the name with its file or folder from the root, so that all spellings are one network."""
    if name.startswith("hf:"):
        folder, colon, settings = name.removeprefix("hf:").partition(":")
        return f"hf:{absolute(folder)}{colon}{settings}" if (expanded(folder) / "config.json").is_file() else name
    file, colon, function = name.rpartition(":")
    there = colon and is_own_model(name) and expanded(file).is_file()
    return f"{absolute(file)}:{function}" if there else name


def check_own(name: str) -> None:
    """Refuse a name that no network can be made from, before the data are read."""
    if name.startswith("hf:"):
        _configuration(name)
    else:
        with process.restored():
            Code.in_file(name, "model").load(arguments=2)


def code_of(name: str) -> Code | None:
    """Return the function in a file, or the configuration in a folder, whose hash is the version.

    None for an architecture by name. A file that is gone raises an OSError.
    """
    if not name.startswith("hf:"):
        return Code.in_file(name, "model")
    folder = Path(name.split(":")[1])
    if not folder.is_absolute():
        return None
    text = json.dumps(json.loads((folder / "config.json").read_text(encoding="utf-8")), sort_keys=True)
    return Code(known_as(name), source=hashlib.sha256(text.encode()).hexdigest()[:12])


def try_own(name: str, shape: Shape, classes: int) -> None:
    """Make the network as each run will, to find its faults before the first; raises as :func:`build_own`."""
    if name.startswith("hf:"):
        build_own(name, shape, classes)
        return
    networks, drawn = [], []
    for seed in (0, 1):
        process.seed(seed)
        networks.append(build_own(name, shape, classes))  # kept: one that returns them again is refused by the weights
        drawn.append(process.drawn(torch.device("cpu")))
    if alike := [each for each in ("numpy", "random") if drawn[0][each] == drawn[1][each]]:
        raise ValueError(
            f"expected {known_as(name)} to leave the seeds of torch, NumPy and `random` as they are, got a call that "
            f"seeds {' and '.join(alike)}: every run would draw the same from there on. Leave that out; all three are "
            "seeded with the run's seed before the call."
        )


def build_own(name: str, shape: Shape, classes: int) -> nn.Module:
    """Make the network; weights depend on torch's global seed.

    Raises:
        ValueError, TypeError: the result is not a network from images of ``shape`` to ``classes`` logits.
        YourCodeFailed: the function raised an error.
    """
    if name.startswith("hf:"):
        model: Any = Logits(_hf_model(name, shape, classes))
    else:
        code = Code.in_file(name, "model")
        function = code.load(arguments=2)
        if isinstance(function, nn.Module):
            raise TypeError(
                f"expected {code.name} to be a function that makes a network, got a network. Each run needs its own: "
                "def build(shape, classes): return ..."
            )
        seed = torch.initial_seed()
        try:
            with as_a_program(code.path):
                model = function(shape, classes)
        except Exception as error:
            raise YourCodeFailed(f"{code.name}({shape}, {classes}) raised.\n{own_traceback(error)}") from error
        except SystemExit as error:
            raise YourCodeFailed(f"expected {code.name} to return a network, got exit({error.code}).") from error
        if not isinstance(model, nn.Module):
            raise TypeError(f"expected {code.name} to return a torch.nn.Module, got {describe(model)}.")
        if torch.initial_seed() != seed:
            raise ValueError(
                f"expected {code.name} to leave torch's seed as it is, got a call that seeds it with "
                f"{torch.initial_seed()}: every run would start from the same weights. Leave that out; torch is seeded "
                "with the run's seed before the call."
            )
        _check_new(code.name, model)
    _try(known_as(name), model, shape, classes)
    return model


def _check_new(name: str, model: nn.Module) -> None:
    """Refuse a network that an earlier call returned, wholly or in part: its weights are those that a run left."""
    trained = {id(each): each for each in model.parameters() if each.requires_grad}
    if any(made.get(place) is each for place, each in trained.items()):
        raise ValueError(
            f"expected {name} to make a network at each call, got weights that it returned before, so each run would "
            "continue from the one before it. Make them inside the function."
        )
    made.update(trained)


class Logits(nn.Module):
    """A model of transformers that takes images and returns only its logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(pixel_values=x).logits


def _try(name: str, model: nn.Module, shape: Shape, classes: int) -> None:
    """Run two images through the network, to report wrong shapes before training."""
    training = model.training
    with process.generators_kept(), torch.no_grad():
        model.eval()
        try:
            outputs = model(torch.zeros(2, *shape))
        except Exception as error:
            raise YourCodeFailed(f"{name} failed on images of shape {shape}.\n{own_traceback(error)}") from error
        except SystemExit as error:
            raise YourCodeFailed(f"expected {name} to return logits, got exit({error.code}).") from error
        finally:
            model.train(training)
    if not isinstance(outputs, Tensor) or outputs.shape != (2, classes):
        raise ValueError(
            f"expected {name} to give logits (B, {classes}), one per class, got {describe(outputs)} for B = 2. "
            "It is called as build((channels, height, width), classes)."
        )
    if classes > 1 and bool((outputs >= 0).all()) and torch.allclose(outputs.sum(1), outputs.new_ones(2), atol=1e-4):
        raise ValueError(
            f"expected {name} to give logits, got probabilities, which add up to 1. Leave out the softmax at its end: "
            "cross-entropy contains it."
        )
    if not any(each.requires_grad for each in model.parameters()):
        raise ValueError(f"expected {name} to have parameters to train, got none.")


def _configuration(name: str) -> tuple[Any, dict[str, Any]]:
    """Return the configuration of an architecture with the given settings, and those settings."""
    transformers: Any = import_extra("transformers", "transformers", name)
    import_extra("transformers.models.auto.modeling_auto", "transformers", name)
    _, architecture, *settings = name.split(":")
    mapping = transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
    given = dict(_setting(name, text) for text in settings)
    if (Path(architecture) / "config.json").is_file():
        kind = json.loads((Path(architecture) / "config.json").read_text(encoding="utf-8")).get("model_type")
        config = transformers.AutoConfig.from_pretrained(architecture, local_files_only=True)
    else:
        classes = {
            each: kind for kind, found in mapping.items() for each in ([found] if isinstance(found, str) else found)
        }
        kind = classes.get(architecture, architecture)
        if kind not in mapping:
            some = ", ".join(list(mapping)[:8])
            hint = nearest(architecture, [*mapping, *classes], "hf:") or f" There are {some}, ..."
            raise ValueError(f"expected an image classifier of transformers, got {name!r}.{hint}")
        config = transformers.AutoConfig.for_model(kind)
    for setting, value in given.items():
        if not hasattr(config, setting):
            hint = nearest(setting, config.to_dict())
            raise ValueError(f"expected a setting of {kind}'s configuration in {name!r}, got {setting!r}.{hint}")
        setattr(config, setting, value)
    return config, given


def _setting(name: str, text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ValueError(f"expected settings of {name!r} to look like hidden_size=64, got {text!r}.")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value


def _hf_model(name: str, shape: Shape, classes: int) -> nn.Module:
    transformers: Any = import_extra("transformers", "transformers", name)
    config, given = _configuration(name)
    config.num_labels = classes
    channels, height, width = shape
    if hasattr(config, "num_channels"):
        config.num_channels = channels
    if hasattr(config, "image_size") and "image_size" not in given:
        config.image_size = height if height == width else (height, width)
    patch = getattr(config, "patch_size", None)
    if isinstance(patch, int) and (height % patch or width % patch):
        raise ValueError(
            f"expected a patch_size of {name!r} that divides images of {width} x {height}, got {patch}. Pass "
            f"{name}:patch_size=4, or for images of your own --image-size "
            f"{patch * max(1, round(max(height, width) / patch))}."
        )
    try:
        return transformers.AutoModelForImageClassification.from_config(config)
    except (ValueError, TypeError, RuntimeError, KeyError, ImportError) as error:  # by architecture
        raise ValueError(
            f"expected {name!r} to make a network for images of shape {shape}, got {type(error).__name__}: {error}."
        ) from error
