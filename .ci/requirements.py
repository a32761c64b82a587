"""Print what the core, the lab and their tests need; with --oldest in the lowest versions pyproject.toml allows.

With --group NAME, what a dependency group of pyproject.toml needs, for a pip that does not know groups.
"""

import re
import sys
import tomllib
from pathlib import Path

content = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
project = content["project"]


def group(name: str) -> list[str]:
    """Return the requirements of a dependency group and of the groups it includes."""
    found = []
    for each in content["dependency-groups"][name]:
        found += group(each["include-group"]) if isinstance(each, dict) else [each]
    return found


if sys.argv[1:2] == ["--group"]:
    print(*group(sys.argv[2]))
else:
    needed = [*project["dependencies"], *project["optional-dependencies"]["lab"]]
    if sys.argv[1:] == ["--oldest"]:
        needed = [re.sub(">=", "==", requirement) for requirement in needed]
    print(*needed, *(re.split("[<>=]", requirement)[0] for requirement in group("test")))
