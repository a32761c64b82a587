"""Docstrings as Markdown: Sphinx roles become links to the API pages or plain code, ``::`` a colon, doctests code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr):`([^`]+)`")
PAGES = Path(__file__).parent / "api"


def documented() -> set[str]:
    """Return every name that has an entry on an API page."""
    return {name for page in PAGES.glob("*.md") for name in re.findall(r"(?m)^::: (\S+)", page.read_text())}


class Roles(griffe.Extension):
    """Rewrites docstrings as they are read."""

    def __init__(self) -> None:
        super().__init__()
        self.names = documented()

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        text = ROLE.sub(lambda match: self._link(match[1], obj), obj.docstring.value)
        text = re.sub(r"(?m)(?<=\w)::$", ":", text).replace("\n::\n", "\n")
        obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", text)  # the heading griffe reads doctests under

    def _link(self, name: str, obj: griffe.Object) -> str:
        """Return ``batchtrim.X`` if X has an entry, or the entry of a class for its bare method."""
        if name in self.names:
            return f"[`{name}`][{name}]"
        owner = obj if obj.is_class else obj.parent
        public = f"batchtrim.{owner.name}" if owner is not None else ""
        if public in self.names and owner is not None and name in owner.members and owner.members[name].docstring:
            return f"[`{name}`][{public}.{name}]"
        return f"`{name}`"
