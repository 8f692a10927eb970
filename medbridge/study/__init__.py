"""The study: for several models and strata, where the bottleneck is: the vision tower, support, or sampling."""

from __future__ import annotations

from medbridge.study.result import StudyResult
from medbridge.study.settings import StudyConfig, StudySettings
from medbridge.study.study import run_study

__all__ = ["StudyConfig", "StudyResult", "StudySettings", "run_study"]
