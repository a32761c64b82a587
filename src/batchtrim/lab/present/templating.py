"""Render pages from templates: every value is escaped, except charts and the package's own style and script."""

from __future__ import annotations

import functools
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape


def render(template: str, **values: Any) -> str:
    """Return a page from ``templates/``; it is self-contained and fetches nothing."""
    return _environment().get_template(template).render(values)


def shipped(name: str) -> Markup:
    """Return a style sheet or script that belongs to this package."""
    return Markup(resources.files(__package__ or "").joinpath(name).read_text(encoding="utf-8"))


@functools.cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("batchtrim.lab.present"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["shipped"] = shipped
    environment.filters["breakable"] = _breakable
    return environment


def _breakable(text: object) -> Markup:
    """Allow line breaks before a bracket and after a comma, but not inside an identifier."""
    return escape(text).replace("(", Markup("<wbr>(")).replace(",", Markup(",<wbr>"))
