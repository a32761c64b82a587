"""Explain why a function could not be traced: the first line of torch's message, and the line of the model."""

from __future__ import annotations

import linecache
import re
import sysconfig
import traceback
from typing import Any

import sympy

from batchtrim._checks import in_one_line

__all__ = ["cause_of", "failure", "fixed_by", "line_of", "told", "too_many"]

_NOT_THE_MODELS = ("/torch/", "/batchtrim/engine/")
_STDLIB = sysconfig.get_path("stdlib").replace("\\", "/")
_WITHOUT_SOURCE = re.compile(r"<(?!ipython)")  # code made from text, of which no line can be shown
# "raised exception Error('...')", in torch 2.10 "raised exception Error([ConstantVariable(str: '...')])".
# Torch 2.8 does not tell the text, but the line: "raise Error('...')".
_RAISED = re.compile(r"raised? (?:exception )?(\w+)\((?:\[ConstantVariable\(str: )?(['\"])(.*)\2\)")
_LOCATION = re.compile(r"(?P<code>.+?)\s+# (?P<path>\S.*):(?P<line>\d+) in \S+$")
_FRAME = re.compile(r'File "(?P<path>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)')


def cause_of(error: BaseException) -> BaseException:
    """Return the error at the bottom of those that torch's tracer wraps."""
    while getattr(error, "inner_exception", None) is not None:
        error = error.inner_exception  # type: ignore[attr-defined]
    return error


def too_many(cause: BaseException) -> bool:
    """Return True if torch's tracer made as many traces as it may."""
    return type(cause).__name__ == "FailOnRecompileLimitHit"


def told(cause: BaseException) -> str:
    """Return the reason in one line, and the last line outside torch that the tracer reached."""
    if too_many(cause):
        return "its Python changes from step to step, each time with a new trace. Hold what changes in a tensor"
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    if not lines:
        return f"it cannot be traced as one graph ({type(cause).__name__})"
    if lines[0] == "Observed exception" and (raised := _RAISED.search(str(cause))) is not None:
        ours = raised[1] == "CannotCapture"
        return raised[3] if ours else f"its trace raises {raised[1]}{_place(lines)}: {raised[3]}"
    if "only concrete integers" in lines[0]:
        return f"it cannot be traced as one graph{_place(lines)}: an operator takes a size of the batch for a number"
    explained = next((f" {line}" for line in lines if line.startswith("Explanation: ")), "")
    return f"it cannot be traced as one graph{_place(lines)}: {lines[0]}{explained}"


def failure(error: BaseException) -> str:
    """Return why a trace fails in its first run, in one line, with the cure where torch itself is at fault."""
    if isinstance(error, AssertionError) and "tensors_saved" in _statement(error):  # torch.compile fails alike
        return (
            "torch cannot trace oneDNN's kernel of an LSTM whose inputs require no gradient; inside "
            "torch.backends.mkldnn.flags(enabled=False), it can"
        )
    return in_one_line(error)


def _statement(error: BaseException) -> str:
    """Return the source of the statement that raised an error."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    first = last.lineno or 0
    return "".join(linecache.getline(last.filename, at) for at in range(first, (last.end_lineno or first) + 1))


def _place(lines: list[str]) -> str:
    """Return `` at `line of code` (file:line)``, if the tracer tells."""
    found = ""
    for number, line in enumerate(lines[:-1]):
        frame = _FRAME.search(line)
        if frame is None or _WITHOUT_SOURCE.match(frame["path"]):
            continue
        path = frame["path"].replace("\\", "/")
        of_python = path.startswith(_STDLIB) and "-packages" not in path
        if not of_python and not any(part in path for part in _NOT_THE_MODELS):
            found = f" at {_shown(lines[number + 1], path, frame['line'])}"
    return found


def line_of(location: str) -> str:
    """Return `` `line of code` (file:line)`` of a tracer's location; nothing if the line is none of the model's."""
    found = _LOCATION.match(location)
    if found is None or "batchtrim/engine/" in (path := found["path"].replace("\\", "/")):
        return ""
    return _shown(found["code"], path, found["line"])


def _shown(code: str, path: str, line: str) -> str:
    return f"`{code[:120]}` ({path.rpartition('/')[2]}:{line})"


def fixed_by(tensor: Any, size: Any) -> str:
    """Return the line that made the traced batch size a number, if the tracer tells: ``", by ..."``."""
    guards = getattr(getattr(getattr(tensor, "fake_mode", None), "shape_env", None), "guards", ())
    for guard in guards:
        if isinstance(guard.expr, sympy.Eq) and size in guard.expr.args:
            line = line_of(getattr(getattr(guard, "sloc", None), "maybe_user_loc", None) or "")
            return f", by {line}" if line else ""
    return ""
