import math

import pytest
import torch

from polymamba.kernels import largest


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("width", [1, 7, 5000])
def test_places_and_what_has_none(backend, width, device_of):
    x = torch.randn(6, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    x[1, width // 2] = 9.0
    x[2, :] = -math.inf
    x[3, width - 1] = math.nan
    x[4, width // 3] = math.inf
    x[5, :] = -2.0
    places, bad = largest(x.to(device_of(backend)), backend=backend)
    assert bad.tolist() == [False, False, True, True, True, False]
    expected = [x[0].float().argmax().item(), width // 2, 0]
    assert [places[row].item() for row in (0, 1, 5)] == expected
