from .interface import MambaWeights, mamba_stack_step, mamba_step
from .journal import Journal
from .reference import mamba_step_reference

__all__ = ["Journal", "MambaWeights", "mamba_stack_step", "mamba_step", "mamba_step_reference"]
