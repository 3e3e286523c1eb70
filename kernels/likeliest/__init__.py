from .interface import likeliest

__all__ = ["likeliest"]
