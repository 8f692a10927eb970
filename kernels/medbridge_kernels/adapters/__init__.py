"""The GRPO loss under other conventions than packed rows: padded batches here; TRL's and Liger's argument forms in the
modules `trl` and `liger`, which need neither of the two to be imported.
"""

from medbridge_kernels.adapters.padded import padded_grpo_loss, padded_linear_grpo_loss

__all__ = ["padded_grpo_loss", "padded_linear_grpo_loss"]
