"""mkdocs hooks: the method cards and their table follow the lab's table, so that a new method is a row and a card."""

from __future__ import annotations

from typing import Any

from batchtrim.lab.methods.table import METHODS

TABLE = "<!-- table of methods -->"


def on_config(config: Any) -> Any:
    """A page in the navigation for every card, in the order of the table."""
    section = next(part["Methods"] for part in config.nav if "Methods" in part)
    section += [{name: f"methods/{name}.md"} for name in METHODS]
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The table of methods, where a page asks for it."""
    return markdown.replace(TABLE, table())


def table() -> str:
    """A row a method: card, summary, parameters with their defaults, source."""
    rows = ["| method | in a sentence | parameters | source |", "|---|---|---|---|"]
    for row in METHODS.values():
        params = ", ".join(f"`{name}` {param.default:g}" for name, param in row.params.items())
        rows.append(f"| [`{row.name}`]({row.name}.md) | {row.summary} | {params} | {row.source} |")
    return "\n".join(rows)
