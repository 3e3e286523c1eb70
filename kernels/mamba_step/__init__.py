from .interface import MambaWeights, mamba_stack_step, mamba_step
from .journal import PERIOD, Journal
from .reference import mamba_step_reference

__all__ = ["PERIOD", "Journal", "MambaWeights", "mamba_stack_step", "mamba_step", "mamba_step_reference"]
