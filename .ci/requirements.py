"""Print what the core, the lab and their tests need; with --oldest in the lowest versions pyproject.toml allows."""

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
needed = [*project["dependencies"], *project["optional-dependencies"]["lab"]]
if sys.argv[1:] == ["--oldest"]:
    needed = [re.sub(">=", "==", requirement) for requirement in needed]
print(*needed, "hypothesis", "pytest", "pytest-timeout", "pytest-xdist")
