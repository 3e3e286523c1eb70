from .triton import embed_patches

__all__ = ["embed_patches"]
