"""A page from a template: one self-contained file, which may load nothing and run nothing but what is named here."""

import base64
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined


def render_template(template: Path, filters: dict[str, Callable[..., str]], **values: Any) -> str:
    """The page as HTML text. All text of `values` is escaped, but for `Markup`.

    The template takes its head, with the style sheet and the Content-Security-Policy, and the frame of its charts from
    `parts.html.jinja`.
    """
    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    return environment.get_template(template.name).render(**values)


def script_source(script: str) -> str:
    """What a Content-Security-Policy calls the one inline script that may run: the hash of what stands between its tags."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
