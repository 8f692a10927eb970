"""The report of a run: one HTML file, a summary for scripts, and the verdict table for the terminal."""

from __future__ import annotations

from medbridge.report.html import write_report
from medbridge.report.summary import print_verdicts, summarise

__all__ = ["print_verdicts", "summarise", "write_report"]
