"""What a server's workers get beside vLLM's own methods; for `--worker-extension-cls`. Imported in workers only."""

from __future__ import annotations

from vllm.platforms import current_platform

from medbridge.rollout.vllm.seeds import allow_seeds_on_cpu
from medbridge.rollout.vllm.weights import WeightsExtension

if current_platform.is_cpu():
    allow_seeds_on_cpu()  # here, since a worker imports this before it computes anything


class ServerExtension(WeightsExtension):
    """New weights."""
