from .interface import MambaWeights, mamba_stack_step, mamba_step
from .reference import mamba_step_reference

__all__ = ["MambaWeights", "mamba_stack_step", "mamba_step", "mamba_step_reference"]
