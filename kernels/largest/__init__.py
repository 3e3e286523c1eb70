from .interface import hand_over, largest

__all__ = ["hand_over", "largest"]
