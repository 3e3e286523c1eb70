"""Where class tokens stand among patches, and positions of another grid."""

import pytest
import torch

from polymamba.vision.class_tokens import join_tokens, resized_positions, split_tokens, tokens_first


@pytest.mark.parametrize("token", ["middle", "head", "double", "none"])
@pytest.mark.parametrize("n_patches", [1, 4, 7])
def test_places_of_tokens(token, n_patches):
    n = {"double": 2, "none": 0}.get(token, 1)
    patches, tokens = torch.arange(n_patches)[None, :, None], -1 - torch.arange(n)[None, :, None]
    sequence = join_tokens(tokens, patches, token)[0, :, 0].tolist()
    expected = list(range(n_patches))
    if token == "middle":
        expected.insert(n_patches // 2, -1)
    elif token != "none":
        expected = [-1, *expected] + ([-2] if token == "double" else [])
    assert sequence == expected
    split = split_tokens(join_tokens(tokens, patches, token), token)
    assert torch.equal(split[0], tokens)
    assert torch.equal(split[1], patches)
    first = tokens_first(join_tokens(tokens, patches, token), token)[0, :, 0].tolist()
    assert first == tokens[0, :, 0].tolist() + list(range(n_patches))


@pytest.mark.parametrize("token", ["middle", "head", "double", "none"])
def test_positions_of_another_grid(token):
    """A plane stays a plane, also from a square to a rectangle, and a class token keeps its row at its new place."""
    n = {"double": 2, "none": 0}.get(token, 1)

    def plane(height, width):
        y, x = torch.meshgrid(*((torch.arange(s) + 0.5) / s for s in (height, width)), indexing="ij")
        return torch.stack((y, x), -1).flatten(0, 1)[None]

    tokens = torch.full((1, n, 2), 100.0)
    resized = resized_positions(join_tokens(tokens, plane(14, 14), token), (14, 14), (9, 20), token)
    of_tokens, of_patches = split_tokens(resized, token)
    assert torch.equal(of_tokens, tokens)
    inner = (of_patches - plane(9, 20)).view(9, 20, 2)[2:-2, 2:-2]
    assert inner.abs().max() < 0.02  # bicubic bends a plane at its edges only
    assert of_patches.abs().max() < 2  # nothing of the token's 100 among the patches
