"""medbridge: measure what a medical vision-language model can reach, then bridge (SFT) or sharpen (RL)."""

from __future__ import annotations

__version__ = "0.1.0"
