from .interface import backward_scan_inputs, step_sums

__all__ = ["backward_scan_inputs", "step_sums"]
