import math

import pytest
import torch

from polymamba.kernels import WayOut, hand_over, largest


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


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_is_handed_over(backend, device_of):
    """To the next step and, by turns, to the host; more sequences than a program takes at once."""
    device, n = device_of(backend), 130
    own, turn = torch.zeros(2, n, dtype=torch.int64, device=device)
    ring = torch.zeros(2, n, dtype=torch.int64, pin_memory=device != "cpu")
    out = WayOut(own, ring, turn)
    found = [torch.arange(n) * k for k in (1, 5, 7)]
    bad = torch.zeros(n, dtype=torch.bool)
    bad[129] = True
    for tokens in found:
        hand_over(tokens.to(device), bad.to(device), out, backend=backend)
    if device != "cpu":
        torch.cuda.synchronize()
    assert own.tolist() == found[2].tolist()
    assert turn.tolist() == [1] * n
    assert [row[:129] for row in ring.tolist()] == [found[2].tolist()[:129], found[1].tolist()[:129]]
    assert ring[:, 129].tolist() == [-1, -1]
