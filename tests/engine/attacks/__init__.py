"""Networks, losses and batches made to be got wrong by an engine; see :mod:`attacks.base`."""

from attacks import backward, cutting, hidden, plain, python, state, traces
from attacks.base import ATTACKS, KINDS, Attack

__all__ = ["ATTACKS", "KINDS", "Attack", "backward", "cutting", "hidden", "plain", "python", "state", "traces"]
