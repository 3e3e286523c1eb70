from .interface import expert_mlp, fuses_experts

__all__ = ["expert_mlp", "fuses_experts"]
