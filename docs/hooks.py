"""mkdocs hooks: a page for each notebook, with its outputs; method cards and their table; options that stay whole."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import Any

from mkdocs.structure.files import File
from nbconvert import MarkdownExporter

from batchtrim.lab.methods.table import METHODS

OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
TABLE = "<!-- table of methods -->"


def on_config(config: Any) -> Any:
    """Put a page for every card into the navigation, in the order of the table."""
    section = next(part["Methods"] for part in config.nav if "Methods" in part)
    section += [{name: f"methods/{name}.md"} for name in METHODS]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add a page for every notebook, and the images in its outputs. Nothing is run: outputs are those committed."""
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        path = PurePosixPath(notebook.src_uri)
        resources = {"output_files_dir": path.stem, "unique_key": "output"}
        markdown, resources = MarkdownExporter().from_filename(notebook.abs_src_path, resources)
        # the text of an image's type is no description of it
        page = (
            markdown.replace("![png]", f"![Output of {path.stem}]")
            + f"\n\n[This notebook]({path.name}) to run yourself.\n"
        )
        files.append(File.generated(config, str(path.with_suffix(".md")), content=page))
        for name, content in resources["outputs"].items():
            files.append(File.generated(config, str(path.parent / name), content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put the table of methods where a page asks for it; a page that is alone under its tab has no list beside it."""
    if page.parent is None:
        page.meta.setdefault("hide", ["navigation"])
    return markdown.replace(TABLE, table())


def on_page_content(html: str, **_: Any) -> str:
    """Keep an option whole where a line of inline code breaks: a browser breaks after its dashes."""

    def whole(code: re.Match[str]) -> str:
        return OPTION.sub(r'<span class="option">\g<0></span>', code[0]) if code[1] else code[0]

    return re.sub(r"<pre.*?</pre>|(<code[^>]*>)[^<]*</code>", whole, html, flags=re.DOTALL)


def table() -> str:
    """Return the table of methods, a row each: card, summary, parameters with their defaults, source."""
    rows = ["| method | in a sentence | parameters | source |", "|---|---|---|---|"]
    for row in METHODS.values():
        params = ", ".join(f"`{name}` {param.default:g}" for name, param in row.params.items())
        rows.append(f"| [`{row.name}`]({row.name}.md) | {row.summary} | {params} | {row.source} |")
    return "\n".join(rows)
