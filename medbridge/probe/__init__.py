"""Probes: what can be read off the features of a vision tower, or of a vision-only encoder, by simple classifiers."""

from __future__ import annotations

from medbridge.probe.encoders import Encoder, EncoderSettings, open_encoder
from medbridge.probe.probing import ProbeResult, ProbeSettings, probe
from medbridge.probe.store import FeatureStore

__all__ = [
    "Encoder",
    "EncoderSettings",
    "FeatureStore",
    "ProbeResult",
    "ProbeSettings",
    "open_encoder",
    "probe",
]
