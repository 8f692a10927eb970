"""The command line: every command, its options and what it prints. The work is done elsewhere."""

from __future__ import annotations

import os

# A waiting OpenMP thread gives its core back: on a shared machine, spinning ones slow everything down several-fold.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from medbridge.cli import data, evaluate, probe, runs, setup, study, subset  # noqa: F401  the commands, which add themselves
from medbridge.cli.app import app, main, state

__all__ = ["app", "main", "state"]
