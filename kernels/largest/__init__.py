from .interface import largest

__all__ = ["largest"]
