from .interface import MambaWeights, mamba_stack_step, mamba_step, norm_and_head
from .reference import mamba_step_reference

__all__ = ["MambaWeights", "mamba_stack_step", "mamba_step", "mamba_step_reference", "norm_and_head"]
