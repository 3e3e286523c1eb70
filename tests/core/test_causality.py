"""Models that see what they are to predict are found, however little of it they see."""

import pytest
import torch
import torch.nn.functional as F

from polymamba.core import InputError
from polymamba.core.causality import require_causal

N, LENGTH = 11, 23


def one_hot(ids):
    return F.one_hot(ids, N).float()


def running_mean(ids):
    return one_hot(ids).cumsum(1) / torch.arange(1, ids.shape[1] + 1)[:, None]


def ask(logits_of, tolerance=1e-5):
    options = {"n_values": N, "length": LENGTH, "unit": "letter", "tolerance": tolerance}
    require_causal(logits_of, torch.device("cpu"), **options)


def test_what_is_causal_passes():
    ask(running_mean)
    with torch.autocast("cpu", torch.bfloat16):  # in which a product of one row may round otherwise than among many
        ask(lambda ids: running_mean(ids) @ torch.eye(N))


@pytest.mark.parametrize("seen", [1, LENGTH // 2, LENGTH - 1])
def test_one_place_that_is_seen_too_early(seen):
    def leaky(ids):
        logits = running_mean(ids)
        logits[:, seen - 1] += 1e-3 * one_hot(ids)[:, seen]
        return logits

    with pytest.raises(InputError, match=f"sees the future: changing letter {seen} .* bits per letter"):
        ask(leaky)
    ask(leaky, tolerance=1e-2)


def test_no_numbers():
    with pytest.raises(InputError, match="not finite"):
        ask(lambda ids: running_mean(ids) / 0)
