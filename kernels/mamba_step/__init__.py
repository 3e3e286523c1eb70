from .interface import MambaWeights, few_rows_head, mamba_stack_step, mamba_step
from .reference import mamba_step_reference

__all__ = ["MambaWeights", "few_rows_head", "mamba_stack_step", "mamba_step", "mamba_step_reference"]
