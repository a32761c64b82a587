"""Print requirements for the lowest versions that pyproject.toml allows of the core and the lab, and for the tests."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
lowest = [*project["dependencies"], *project["optional-dependencies"]["lab"]]
print(
    *(re.sub(">=", "==", requirement) for requirement in lowest),
    "hypothesis",
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
)
