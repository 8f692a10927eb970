"""Questions on medical images: items, importers, prompts and the reading of answers."""

from __future__ import annotations

from medbridge.data.answers import Outcome, grade
from medbridge.data.check import CheckReport, check_items
from medbridge.data.convert import ImportSummary, import_to_folder
from medbridge.data.images import ImageCache, load_image
from medbridge.data.importers.brain import brain_folder
from medbridge.data.items import Item, ItemSet, Permutation, Skip
from medbridge.data.prompts import PromptSettings, build_prompt, permutation, target_completion
from medbridge.data.settings import DataSettings, SourceSettings, SplitName
from medbridge.data.show import describe_items, format_items
from medbridge.data.sources import open_items

__all__ = [
    "CheckReport",
    "DataSettings",
    "ImageCache",
    "ImportSummary",
    "Item",
    "ItemSet",
    "Outcome",
    "Permutation",
    "PromptSettings",
    "Skip",
    "SourceSettings",
    "SplitName",
    "brain_folder",
    "build_prompt",
    "check_items",
    "describe_items",
    "format_items",
    "grade",
    "import_to_folder",
    "load_image",
    "open_items",
    "permutation",
    "target_completion",
]
