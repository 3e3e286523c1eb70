from .interface import WayOut, hand_over, largest

__all__ = ["WayOut", "hand_over", "largest"]
