"""The environment of a run: versions, hardware, and the commit of the package."""

from __future__ import annotations

import functools
import platform
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import batchtrim
from batchtrim.lab.run.ranks import Ranks
from batchtrim.lab.run.task_config import AnyConfig, TaskConfig
from batchtrim.lab.task.own_code import Code, hash_of_file
from batchtrim.lab.task.own_models import code_of, is_own_model


def environment(config: AnyConfig) -> dict[str, Any]:
    """Return the versions and hardware that a run's numbers were measured with."""
    return {
        **_machine(),
        "threads": config.threads,
        "processes": Ranks.from_environment().world,
        "device": _device_name(config.device),
        **sources(config),
    }


def sources(config: AnyConfig) -> dict[str, Any]:
    """Return hashes of the user's own code: its file, and the modules beside it that it imports."""
    code = program_of(config)
    if code is None:
        return {}
    found = {"source": code.source, "helpers": code.helpers()}
    return {name: value for name, value in found.items() if value}


def program_of(config: AnyConfig) -> Code | None:
    """Return the user's own code that a run calls; None if there is none."""
    if isinstance(config, TaskConfig):
        return config.code
    if not is_own_model(config.model):
        return None
    try:
        return code_of(config.model)
    except (OSError, ValueError):
        return None  # the file is gone


def hash_now(file: Path) -> str:
    """Return the hash of the program in a file; "" if there is none."""
    try:
        return hash_of_file(file)
    except (OSError, ValueError):
        return ""


def changed_since(then: Mapping[str, Any], code: Code, hash_of: Callable[[Path], str] = hash_now) -> list[str]:
    """Return the names of the program, and of the modules beside it, that differ from those of :func:`sources`."""
    found = [code.name] if code.source and then.get("source") not in (None, code.source) else []
    helpers = then.get("helpers")
    if code.path is None or not isinstance(helpers, dict):
        return found
    return found + [name for name, source in helpers.items() if hash_of(Path(code.path).parent / name) != source]


@functools.cache
def _machine() -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "batchtrim": batchtrim.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "commit": _commit(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


def _commit() -> str | None:
    """Return the commit of the checkout that this package runs from, with + if files differ; None if installed."""
    here = Path(batchtrim.__file__).resolve().parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        if not git("ls-files", "__init__.py"):
            return None
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else device
