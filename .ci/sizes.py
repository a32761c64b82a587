"""Name the Python files of more than 400 lines, and the functions of more than 60 lines of code; exit with 1 if any.

Lines of code are those that are neither blank, nor a comment, nor part of the function's own docstring.
"""

import ast
import sys
from pathlib import Path

FILE, FUNCTION = 400, 60


def code_lines(function: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> int:
    """Return the number of lines of code of a function."""
    first = function.body[0]
    documented = ast.get_docstring(function, clean=False) is not None
    skipped = range(first.lineno, (first.end_lineno or 0) + 1) if documented else range(0)
    own = (n for n in range(function.lineno, (function.end_lineno or 0) + 1) if n not in skipped)
    return sum(bool(line) and not line.startswith("#") for line in (lines[n - 1].strip() for n in own))


def too_long(path: Path) -> list[str]:
    """Return a line for the file and for each of its functions that is too long."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    functions = [each for each in ast.walk(ast.parse(text)) if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [f"{path}: {len(lines)} lines, {FILE} at most"] * (len(lines) > FILE) + [
        f"{path}:{each.lineno}: {each.name} has {count} lines of code, {FUNCTION} at most"
        for each in functions
        if (count := code_lines(each, lines)) > FUNCTION
    ]


folders = sys.argv[1:] or ["src", "tests", "benchmarks", "studies", "examples", ".ci"]
found = [line for folder in folders for path in sorted(Path(folder).rglob("*.py")) for line in too_long(path)]
print(*found, sep="\n", end="\n" if found else "")
sys.exit(1 if found else 0)
