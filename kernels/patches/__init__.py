from .interface import embed_patches, serves

__all__ = ["embed_patches", "serves"]
