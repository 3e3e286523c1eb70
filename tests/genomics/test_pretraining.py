"""What a language model is shown and asked: windows and masks against the sequence, and their statistics."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polymamba.core.config import TrainConfig
from polymamba.genomics.alphabet import BOS, MASK, PAD, VOCAB_SIZE, A, N, T, decode, reverse_complement
from polymamba.genomics.n_runs import find_n_runs
from polymamba.genomics.parts import Stretch
from polymamba.genomics.pretraining import TrainGenome, Windows, cut_stretches, masked_example, spread
from polymamba.genomics.reading.genome import Genome
from polymamba.genomics.tokenizers import CHARACTERS, KMers

LENGTH = 1000


@pytest.fixture(scope="module")
def genome(tmp_path_factory):
    """Of random bases, lower-case ones and N; the second contig is short."""
    folder, rng = tmp_path_factory.mktemp("genome"), np.random.default_rng(0)
    letters = rng.choice(list("ACGTacgtN"), LENGTH, p=[0.2] * 4 + [0.04] * 4 + [0.04])
    letters[300:420] = "N"
    (folder / "x.fa").write_text(f">x\n{''.join(letters)}\n>y\nACGTacgtAC\n")
    with Genome([folder / "x.fa"]) as genome:
        yield genome


def windows_of(genome, stretches=None, max_n=0.5) -> Windows:
    stretches = stretches or [Stretch(0, 0, LENGTH, "train"), Stretch(1, 0, 10, "train")]
    return Windows(stretches, find_n_runs(genome, stretches), max_n)


def task(genome, **changes) -> TrainGenome:
    options = {
        "objective": "next",
        "tokenizer": CHARACTERS,
        "length": 32,
        "first_length": 32,
        "steps_per_epoch": None,
        "mask_rate": 0.15,
        "lower_case_weight": 1.0,
        "rc_augment": False,
        "valid_bases": 10**9,
    } | changes
    config = options.pop("config", TrainConfig(batch_size=4))
    return TrainGenome(genome, windows_of(genome), windows_of(genome), config, 5, **options)


# Where windows are cut


@settings(max_examples=50)
@given(st.integers(1, 1200), st.integers(0, 10), st.floats(0, 1), st.booleans(), st.integers(0, LENGTH - 2), st.data())
def test_windows(genome, length, seed, max_n, random, start, data):
    end = data.draw(st.integers(start + 1, LENGTH))
    where = windows_of(genome, [Stretch(0, start, end, "train"), Stretch(1, 2, 9, "train")], max_n)
    found, n_dropped = cut_stretches(where, length, np.random.default_rng(seed) if random else None)
    sizes = {0: end - start, 1: 7}
    for i, size in sizes.items():
        # All of a stretch but what is dropped, and at random less than a window at either end.
        n = -(-size // length) if not random or size <= length else (size // length, size // length - 1, 1)
        of_stretch = [w for w in found.tolist() if w[0] == i]
        if n_dropped == 0:
            assert len(of_stretch) in (n if isinstance(n, tuple) else (n,))
        for (_, one, first_size), (_, other, _) in pairwise(of_stretch):
            assert one + first_size <= other
    for i, at, size in found.tolist():
        stretch = where.stretches[i]
        assert stretch.start <= at < at + size <= stretch.end
        assert size == length or size == stretch.n_bases or (not random and at + size == stretch.end)
        tokens, _ = genome.tokens(stretch.contig, at, at + size)
        assert np.mean(tokens == N) <= max_n


def test_windows_of_n_are_dropped_and_counted(genome):
    found, n_dropped = cut_stretches(windows_of(genome), 20, None)
    assert n_dropped == 6  # 300 to 420
    assert len(found) == 50 - 6 + 1


def test_an_epoch_is_cut_at_other_places(genome):
    starts = {tuple(np.sort(np.concatenate(task(genome).plan(epoch))[:, 1])) for epoch in range(4)}
    assert len(starts) == 4
    again = [np.concatenate(task(genome).plan(2)).tolist() for _ in range(2)]
    assert again[0] == again[1]


def test_some_windows_spread_over_all():
    windows = np.column_stack((np.zeros(100, np.int64), np.arange(100) * 10, np.full(100, 10)))
    assert spread(windows, 35)[:, 1].tolist() == [0, 500, 990]
    assert spread(windows, 1).tolist() == [[0, 0, 10]]
    assert len(spread(windows, 1000)) == 100


# Length warm-up


def test_windows_grow_at_a_constant_number_of_tokens(genome):
    warming = task(genome, length=64, first_length=8, config=TrainConfig(batch_size=2))
    assert [warming.length_in(epoch) for epoch in range(6)] == [8, 16, 32, 64, 64, 64]
    assert warming.length_in(10**6) == 64
    for epoch in range(5):
        plan = warming.plan(epoch)
        full = [batch for batch in plan if len(batch) == 128 // warming.length_in(epoch)]
        assert len(full) >= len(plan) - 2  # what is left over, and the short contig's
        assert max(batch[:, 2].sum() for batch in plan) == 128


def test_a_window_longer_than_max_tokens_is_a_batch(genome):
    long = task(genome, length=256, first_length=256, config=TrainConfig(batch_size=8, max_tokens=100))
    assert {len(batch) for batch in long.plan(0)} == {1}
    assert {len(batch) for batch in task(genome, config=TrainConfig(batch_size=8, max_tokens=100)).plan(0)} <= {1, 2, 3}


def test_steps_of_an_epoch(genome):
    few = task(genome, steps_per_epoch=3)
    assert len(few.plan(0)) in (3, 4)  # the short contig's window may need a batch of its own
    assert sum(len(batch) for batch in few.plan(0)) == 12
    drawn = {tuple(window) for epoch in range(30) for batch in few.plan(epoch) for window in batch.tolist()}
    assert len(drawn) > 100


# What is asked


def test_next_nucleotide(genome):
    made = task(genome, lower_case_weight=0.25)
    for description in made.plan(0):
        inputs, targets, weights, mask = made.batch(description, 0)
        for row, (i, start, size) in enumerate(description.tolist()):
            tokens, lower = genome.tokens(i, start, start + size)
            assert inputs[row, 0] == BOS
            assert inputs[row, 1:size].tolist() == tokens[:-1].tolist()
            assert targets[row, :size].tolist() == tokens.tolist()
            wanted = np.where(tokens == N, 0, np.where(lower, 0.25, 1))
            assert weights[row, :size].tolist() == wanted.tolist()
            assert inputs[row, size:].eq(PAD).all()
            assert not weights[row, size:].any()
            assert mask is None or mask[row].tolist() == [j < size for j in range(len(mask[row]))]


def test_either_strand(genome):
    made = task(genome, rc_augment=True, lower_case_weight=0.5)
    n_reversed, n = 0, 0
    for epoch in range(6):
        for description in made.plan(epoch):
            batch = made.batch(description, epoch)
            assert all(
                torch.equal(a, b) for a, b in zip(batch, made.batch(description, epoch), strict=True) if a is not None
            )
            for row, (i, start, size) in enumerate(description.tolist()):
                tokens, lower = genome.tokens(i, start, start + size)
                found = batch.targets[row, :size].numpy()
                forwards, backwards = np.array_equal(found, tokens), np.array_equal(found, reverse_complement(tokens))
                assert forwards != backwards
                lower = lower if forwards else lower[::-1]
                assert np.array_equal(batch.weights[row, :size].numpy() == 0.5, lower & (found != N))
                n_reversed, n = n_reversed + backwards, n + 1
    assert 0.35 < n_reversed / n < 0.65


def test_masks_are_berts():
    rng = np.random.default_rng(0)
    tokens = rng.integers(A, N + 1, 400_000).astype(np.uint8)
    weights = rng.choice([0.5, 1.0], len(tokens)).astype(np.float32)
    inputs, targets, counted = masked_example(tokens, weights, 0.15, VOCAB_SIZE, rng)
    chosen = counted > 0
    n = chosen.sum()
    assert np.array_equal(targets, tokens)
    assert np.array_equal(counted[chosen], weights[chosen])
    assert np.array_equal(inputs[~chosen], tokens[~chosen])
    assert not chosen[tokens == N].any()
    assert n / np.sum(tokens != N) == pytest.approx(0.15, abs=0.003)
    assert np.mean(inputs[chosen] == MASK) == pytest.approx(0.8, abs=0.005)
    assert np.mean(inputs[chosen] == tokens[chosen]) == pytest.approx(0.1 + 0.1 / 4, abs=0.005)
    others = inputs[chosen & (inputs != MASK) & (inputs != tokens)]
    assert np.bincount(others, minlength=N + 1)[A : T + 1] / len(others) == pytest.approx(np.full(4, 0.25), abs=0.02)
    assert set(others.tolist()) == set(range(A, T + 1))


def test_masks_of_an_epoch_are_its_own(genome):
    made = task(genome, objective="masked")
    (description, *_) = made.plan(0)
    one, again, later = made.batch(description, 0), made.batch(description, 0), made.batch(description, 1)
    assert torch.equal(one.inputs, again.inputs)
    assert not torch.equal(one.inputs, later.inputs)
    assert torch.equal(one.targets, later.targets)


class Frequencies(torch.nn.Module):
    """Says the same of every place."""

    def __init__(self, probabilities):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, inputs, padding_mask=None):
        return self.logits.expand(*inputs.shape, -1)


@pytest.mark.parametrize("objective", ["next", "masked"])
def test_loss_and_figures_of_a_model_that_knows_frequencies(objective, genome):
    probabilities = np.full(12, 1e-9)
    probabilities[A : T + 1] = [0.1, 0.2, 0.3, 0.4]
    made = task(genome, objective=objective, lower_case_weight=0.5)
    model = Frequencies(probabilities / probabilities.sum())
    batch = made.batch(made.plan(0)[0], 0)
    weights = batch.weights.double().numpy()
    nats = -np.log(np.append(np.full(A, 1e-9), [0.1, 0.2, 0.3, 0.4, 1e-9]))[batch.targets.numpy()]
    assert made.loss(model, batch).item() == pytest.approx(float((weights * nats).sum() / weights.sum()), rel=1e-5)
    found = made.evaluate(model)
    tokens = np.concatenate([genome.tokens(i, s, s + n)[0] for i, s, n in made.valid_windows.tolist()])
    tokens = tokens[tokens != N]
    bits = -np.log2([0.1, 0.2, 0.3, 0.4])[tokens - A].mean()
    assert found["valid_bits_per_base"] == pytest.approx(bits, abs=1e-5 if objective == "next" else 0.1)
    assert made.score(found) == -found["valid_bits_per_base"]


def test_a_batch_that_asks_nothing_has_no_loss(genome):
    made = task(genome, objective="masked")
    batch = made.batch(made.plan(0)[0], 0)
    nothing = batch._replace(weights=torch.zeros_like(batch.weights))
    model = Frequencies(np.full(12, 1 / 12))
    loss = made.loss(model, nothing)
    loss.backward()
    assert loss.item() == 0
    assert model.logits.grad.eq(0).all()


def test_kmers_are_masked_whole():
    rng, kmers = np.random.default_rng(0), KMers(3)
    ids, _ = kmers.encode(np.tile(np.array([A, A + 1, T, N, A, T, A, A, A], np.uint8), 20_000))
    inputs, targets, counted = masked_example(ids, np.ones(len(ids)), 0.15, kmers.vocab_size, rng)
    chosen = counted > 0
    assert np.array_equal(targets, ids)
    assert not chosen[ids == N].any()
    assert np.mean(inputs[chosen] == MASK) == pytest.approx(0.8, abs=0.01)
    others = inputs[chosen & (inputs != MASK) & (inputs != ids)]
    assert set(others.tolist()) == set(range(VOCAB_SIZE, kmers.vocab_size))


def test_kmers_of_a_window(genome):
    made = task(genome, tokenizer=KMers(3), lower_case_weight=0.5)
    description = made.plan(0)[0]
    inputs, targets, weights, _ = made.batch(description, 0)
    for row, (i, start, size) in enumerate(description.tolist()):
        tokens, lower = genome.tokens(i, start, start + size)
        ids, sizes = made.tokenizer.encode(tokens)
        assert targets[row, : len(ids)].tolist() == ids.tolist()
        assert inputs[row, 1 : len(ids)].tolist() == ids[:-1].tolist()
        at = 0
        for id, n, weight in zip(ids.tolist(), sizes.tolist(), weights[row].tolist(), strict=False):
            wanted = 0 if id == N else np.where(lower[at : at + n], 0.5, 1).mean()
            assert weight == pytest.approx(wanted), decode(tokens[at : at + n])
            at += n
