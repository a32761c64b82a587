"""The lab: the whole family of methods under one harness, from the command line.

``batchtrim compare`` trains the same network with several methods and seeds, records every run, and reports with
paired statistics. :func:`batchtrim.lab.compare` does so with your own training function, and
:func:`batchtrim.lab.summarize` with the results of another program. A run goes down: ``cli``, ``execute`` (many runs),
``run`` (one run), then ``methods`` and ``task``. Its record goes up: ``records``, ``analyse`` (numbers and verdicts),
``present`` (sentences, tables, report).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from batchtrim.lab.own import Run, compare, headline, run_once, summarize

__all__ = ["Run", "compare", "headline", "run_once", "summarize"]


def __getattr__(name: str) -> object:
    if name in __all__:  # imported at first use, since they import the whole lab
        return getattr(importlib.import_module("batchtrim.lab.own"), name)
    raise AttributeError(f"module 'batchtrim.lab' has no attribute {name!r}")
