"""How every HTML page is put together from its template: no text can break the file, no missing name passes."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from medbridge.report.text import clean

TEMPLATES = Path(__file__).parent / "templates"


def environment(*beside: Path) -> Environment:
    """The templates of the report, and those in the folders `beside` before them."""
    return Environment(
        loader=FileSystemLoader([*beside, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )


def script_hash(script: str) -> str:
    """What a page's content security policy calls its one script by, so that a browser runs no other."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _finalize(value: Any) -> Any:
    """What a template prints goes through here: None prints nothing, and no text can break the file."""
    if value is None:
        return ""
    return clean(value) if type(value) is str else value
