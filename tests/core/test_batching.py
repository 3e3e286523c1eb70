import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from polymamba.core.batching import pad_right, shuffled_batches, sorted_batches, windows_of_each

lengths_lists = st.lists(st.integers(0, 300), min_size=1, max_size=400)


@given(lengths_lists, st.integers(1, 9), st.integers(1, 900), st.integers(0, 3), st.integers(0, 3))
def test_every_sequence_once_within_the_limits(lengths, batch_size, max_tokens, seed, epoch):
    lengths = np.array(lengths)
    for batches in (
        shuffled_batches(lengths, batch_size, max_tokens, seed, epoch),
        sorted_batches(lengths, batch_size, max_tokens),
    ):
        assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
        for batch in batches:
            assert len(batch) <= batch_size
            assert len(batch) == 1 or len(batch) * lengths[batch].max() <= max_tokens


def test_a_pure_function_of_seed_and_epoch():
    lengths = np.random.default_rng(0).integers(20, 200, 1000)

    def plan(seed: int, epoch: int) -> list[list[int]]:
        return [b.tolist() for b in shuffled_batches(lengths, 32, 4000, seed, epoch)]

    assert plan(0, 3) == plan(0, 3)
    assert plan(0, 3) != plan(0, 4)
    assert plan(0, 3) != plan(1, 3)


def test_like_lengths_share_a_batch():
    lengths = np.random.default_rng(0).integers(20, 20000, 2000)
    batches = shuffled_batches(lengths, 16, 10**9, 0, 0)
    padded = sum(len(b) * lengths[b].max() for b in batches)
    assert padded < 1.1 * lengths.sum()


def test_pad_right():
    tokens, mask = pad_right([np.array([7, 8], np.uint8), np.array([9], np.uint8)], 4)
    assert tokens.tolist() == [[7, 8], [9, 4]]
    assert tokens.dtype == torch.int64
    assert mask.tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize("n", [0, 1])
def test_few_sequences(n):
    assert len(sorted_batches(np.full(n, 5), 4, 100)) == n


@given(st.lists(st.integers(1, 300), min_size=1, max_size=50), st.integers(1, 90), st.integers(0, 9))
def test_windows_cover_each_sequence_once(lengths, longest, seed):
    of, starts, stops = windows_of_each(np.array(lengths), longest, np.random.default_rng(seed))
    assert (stops - starts >= 1).all()
    assert (stops - starts <= longest).all()
    for sequence, length in enumerate(lengths):
        mine = of == sequence
        assert [0, *stops[mine]] == [*starts[mine], length]
        assert (stops - starts)[mine][1:-1].tolist() == [longest] * (mine.sum() - 2)
        assert mine.sum() <= 2 + length // longest
        assert length > longest or mine.sum() == 1
