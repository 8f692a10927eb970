"""The encoders of a study's probes, with their features kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from medbridge.model import ModelSettings
from medbridge.probe import Encoder, EncoderSettings, FeatureStore, open_encoder
from medbridge.probe.probing import Features
from medbridge.progress import Reporter
from medbridge.study.settings import SightSettings


def open_for(name: str, sight: SightSettings, model: ModelSettings) -> Encoder:
    """The encoder of a name, with the features that a study asks for.

    Raises:
        MedbridgeError: it can't be loaded.
    """
    return open_encoder(name, EncoderSettings(layer=sight.layer, pool=sight.pool), model)


def features_of(
    name: str, sight: SightSettings, model: ModelSettings, cache: Path, reporter: Reporter
) -> tuple[str, Features]:
    """The key of an encoder, and features of image files by it, computed once for each content.

    Equal keys give equal features of the same image.

    Raises:
        MedbridgeError: the encoder can't be loaded.
    """
    encoder = open_for(name, sight, model)
    store = FeatureStore(cache / "features", reporter.say)

    def features(files: Sequence[str]) -> NDArray[np.float32]:
        with reporter.task(f"features of {name}", len(files), "images") as meter:
            return store.features(encoder, files, meter.reach)

    return encoder.key, features
