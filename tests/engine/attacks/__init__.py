"""Networks, losses and batches made to be got wrong by an engine; see :mod:`attacks.base`."""

from attacks import arguments, backward, cutting, habits, hidden, layers, plain, python, state, traces
from attacks.base import ATTACKS, KINDS, Attack

__all__ = [
    "ATTACKS", "KINDS", "Attack", "arguments", "backward", "cutting", "habits", "hidden", "layers", "plain", "python",
    "state", "traces",
]  # fmt: skip
