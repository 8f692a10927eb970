"""Rollouts from `vllm serve` processes over HTTP."""

from medbridge.rollout.server.engine import ServerEngine

__all__ = ["ServerEngine"]
