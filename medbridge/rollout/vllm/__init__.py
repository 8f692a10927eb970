"""Rollouts on vLLM, in a process of ours."""

from __future__ import annotations

from medbridge.rollout.vllm.engine import VllmEngine

__all__ = ["VllmEngine"]
