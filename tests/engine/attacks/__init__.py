"""Networks, losses and batches that an engine could get wrong; see :mod:`attacks.base`."""

from attacks import (
    arguments,
    backward,
    changed,
    chosen,
    combined,
    cutting,
    fidelity,
    habits,
    held,
    hidden,
    layers,
    plain,
    python,
    running,
    state,
    traces,
    training,
    users,
)  # fmt: skip
from attacks.base import ATTACKS, KINDS, Attack

__all__ = [
    "ATTACKS", "KINDS", "Attack", "arguments", "backward", "changed", "chosen", "combined", "cutting", "fidelity",
    "habits", "held", "hidden", "layers", "plain", "python", "running", "state", "traces", "training", "users",
]  # fmt: skip
