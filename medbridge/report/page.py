"""How every HTML page is put together from its template: no text can break the file, no missing name passes."""

from __future__ import annotations

import base64
import hashlib
import time
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from medbridge.report.text import clean
from medbridge.report.view import duration, short

TEMPLATES = Path(__file__).parent / "templates"


def environment(*beside: Path) -> Environment:
    """The templates of the report, and those in the folders `beside` before them, with filters for numbers."""
    made = Environment(
        loader=FileSystemLoader([*beside, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    made.filters |= {
        "two": two,
        "signed": signed,
        "near_one": near_one,
        "percent": percent,
        "count": lambda value: f"{value:,}",
        "duration": duration,
        "when": when,
        "short": short,
    }
    return made


def script_hash(script: str) -> str:
    """What a page's content security policy calls its one script by, so that a browser runs no other."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _finalize(value: Any) -> Any:
    """What a template prints goes through here: None prints nothing, and no text can break the file."""
    if value is None:
        return ""
    return clean(value) if type(value) is str else value


# -- numbers -------------------------------------------------------------------------------------------------


def two(value: float | None) -> str:
    """A share with two decimals and a true minus sign; a dash where it isn't known."""
    return "\u2013" if value is None else f"{value:z.2f}".replace("-", "\u2212")


def signed(value: float | None) -> str:
    """A difference with its sign."""
    said = two(value)
    return f"+{said}" if value is not None and float(f"{value:.2f}") > 0 else said


def near_one(value: float | None) -> str:
    """As `two`, but with what tells a share just below 1 from 1: "0.998", ">0.999"."""
    if value is None or not 0.995 <= value < 1:
        return two(value)
    return f"{value:.3f}" if value < 0.9995 else ">0.999"


def percent(value: float | None) -> str:
    """A share in whole per cent."""
    return "\u2013" if value is None else f"{100 * value:.0f} %"


def when(moment: float | None) -> str:
    """Seconds since the epoch as a date and time."""
    return "" if moment is None else time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(moment))
