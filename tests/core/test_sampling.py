"""The filters against a brute force and against transformers; the draws against the distribution they come from."""

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import generation as hf

from polymamba.core import InputError
from polymamba.core.config import SamplingConfig
from polymamba.core.sampling import next_token_probabilities, sample

# Quarters, so that ties are common.
LOGITS = st.lists(st.integers(-40, 40).map(lambda n: n / 4) | st.just(-math.inf), min_size=1, max_size=9).filter(
    lambda row: max(row) > -math.inf
)
CONFIGS = st.builds(
    SamplingConfig,
    temperature=st.just(0.0) | st.floats(0.05, 5),
    top_k=st.integers(0, 10),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
    repetition_penalty=st.sampled_from([1.0, 0.5, 1.25, 2.0]),
    repetition_window=st.integers(0, 5),
)
RECENT = st.lists(st.integers(-1, 8), max_size=7)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def brute_force(row: list[float], config: SamplingConfig, recent: list[int]) -> list[float]:
    """One row, token by token, in the documented order. Leaves out the cases that rounding decides."""
    seen = {token for token in recent[-config.repetition_window :] if token >= 0}
    row = list(row)
    for token in seen:
        row[token] *= config.repetition_penalty if row[token] < 0 else 1 / config.repetition_penalty
    if config.temperature == 0:
        return [float(i == row.index(max(row))) for i in range(len(row))]
    weights = [math.exp((logit - max(row)) / config.temperature) for logit in row]
    if config.top_k:
        kth_largest = sorted(row, reverse=True)[min(config.top_k, len(row)) - 1]
        weights = [w if logit >= kth_largest else 0.0 for w, logit in zip(weights, row, strict=True)]
    p = [w / sum(weights) for w in weights]
    if config.top_p < 1:
        reached, last = 0.0, 1.0
        for last in sorted(p, reverse=True):
            reached += last
            assume(abs(reached - config.top_p) > 1e-9)
            if reached >= config.top_p:
                break
        p = [x if x >= last else 0.0 for x in p]
    assume(all(x == max(p) or abs(x - config.min_p * max(p)) > 1e-9 for x in p) or config.min_p < 1e-6)
    p = [x if x >= config.min_p * max(p) else 0.0 for x in p]
    return [x / sum(p) for x in p]


@given(LOGITS, CONFIGS, RECENT)
def test_equals_brute_force(row, config, recent):
    recent = [token for token in recent if token < len(row)]
    expected = torch.tensor([brute_force(row, config, recent)], dtype=torch.float64)
    logits = torch.tensor([row], dtype=torch.float64)
    recent = torch.tensor([recent], dtype=torch.int64)
    p = next_token_probabilities(logits, config, recent)
    assert torch.equal(p > 0, expected > 0)
    torch.testing.assert_close(p, expected, rtol=0, atol=1e-12)


@given(LOGITS, CONFIGS, st.randoms(use_true_random=False))
def test_the_order_of_the_vocabulary_does_not_matter(row, config, random):
    assume(config.temperature > 0)  # greedy takes one of those that tie
    order = random.sample(range(len(row)), len(row))
    logits = torch.tensor([row], dtype=torch.float64)
    p = next_token_probabilities(logits, config)
    torch.testing.assert_close(next_token_probabilities(logits[:, order], config), p[:, order], rtol=0, atol=1e-12)


@given(st.lists(LOGITS, min_size=2, max_size=5), CONFIGS)
def test_rows_are_independent_and_sum_to_one(rows, config):
    n_tokens = max(len(row) for row in rows)
    logits = torch.tensor([row + [-math.inf] * (n_tokens - len(row)) for row in rows])
    p = next_token_probabilities(logits, config)
    assert torch.all((p.sum(-1) - 1).abs() < 1e-6)
    assert torch.all(p[logits == -math.inf] == 0)
    for i in range(len(rows)):
        assert torch.equal(p[i : i + 1], next_token_probabilities(logits[i : i + 1], config))


PROCESSORS = {
    "temperature": (SamplingConfig(temperature=0.7), [hf.TemperatureLogitsWarper(0.7)]),
    "top_k": (SamplingConfig(top_k=7), [hf.TopKLogitsWarper(7)]),
    "top_k of all": (SamplingConfig(top_k=1000), [hf.TopKLogitsWarper(1000)]),
    "top_p": (SamplingConfig(top_p=0.6), [hf.TopPLogitsWarper(0.6)]),
    "tiny top_p": (SamplingConfig(top_p=0.001), [hf.TopPLogitsWarper(0.001)]),
    "min_p": (SamplingConfig(min_p=0.2), [hf.MinPLogitsWarper(0.2)]),
    "penalty": (SamplingConfig(repetition_penalty=1.3), [hf.RepetitionPenaltyLogitsProcessor(1.3)]),
    "all": (
        SamplingConfig(temperature=1.4, top_k=20, top_p=0.9, min_p=0.05, repetition_penalty=1.3),
        [
            hf.RepetitionPenaltyLogitsProcessor(1.3),
            hf.TemperatureLogitsWarper(1.4),
            hf.TopKLogitsWarper(20),
            hf.TopPLogitsWarper(0.9),
            hf.MinPLogitsWarper(0.05),
        ],
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_equals_transformers(name):
    config, processors = PROCESSORS[name]
    logits, recent = 3 * torch.randn(50, 37), torch.randint(37, (50, 11))
    scores = hf.LogitsProcessorList(processors)(recent, logits.clone())
    p = next_token_probabilities(logits, config, recent)
    assert torch.equal(p > 0, scores > -math.inf)
    torch.testing.assert_close(p, scores.softmax(-1))


def test_differs_from_transformers_in_ties():
    """Of four equal tokens transformers' top-p 0.5 keeps two, whichever its sort put last; here they stay together."""
    logits = torch.tensor([[1.0, 1.0, 1.0, 1.0, -9.0]])
    kept = hf.TopPLogitsWarper(0.5)(None, logits) > -math.inf
    assert kept.sum() < 4
    p = next_token_probabilities(logits, SamplingConfig(top_p=0.5))
    torch.testing.assert_close(p, torch.tensor([[0.25, 0.25, 0.25, 0.25, 0.0]]))


def test_window_of_the_penalty():
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    recent = torch.tensor([[3, 0, 1, -1, 1]])
    for window, seen in ((0, {0, 1, 3}), (1, {1}), (4, {0, 1}), (9, {0, 1, 3})):
        config = SamplingConfig(repetition_penalty=2, repetition_window=window)
        scores = torch.tensor([[x / 2 if i in seen else x for i, x in enumerate([1.0, 2.0, 3.0, 4.0])]])
        torch.testing.assert_close(next_token_probabilities(logits, config, recent), scores.softmax(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype):
    p = next_token_probabilities(torch.randn(3, 17).to(dtype), SamplingConfig(top_p=0.8))
    assert p.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_small_temperatures_do_not_overflow():
    logits = torch.tensor([[3e38, -3e38, 2.9e38], [5.0, 5.5, -math.inf]])
    greedy = next_token_probabilities(logits, SamplingConfig(temperature=0))
    assert greedy.tolist() == [[1, 0, 0], [0, 1, 0]]
    assert torch.equal(next_token_probabilities(logits, SamplingConfig(temperature=1e-4)), greedy)


def test_draws_follow_the_distribution():
    p = next_token_probabilities(torch.randn(1, 23), SamplingConfig(top_k=15))
    n_draws, possible = 20_000, p[0] > 0
    one_generator = sample(p.expand(n_draws, -1), generators(5) * n_draws)
    neighbouring_seeds = sample(p.expand(n_draws, -1), generators(*range(n_draws)))
    for tokens in (one_generator, neighbouring_seeds):
        counts = tokens.bincount(minlength=23)
        assert counts[~possible].sum() == 0
        expected = p[0, possible].double()
        assert chisquare(counts[possible], n_draws * expected / expected.sum()).pvalue > 0.01


def test_a_draw_depends_on_its_own_generator_only():
    p = torch.rand(6, 31)
    tokens = sample(p, generators(3, 1, 4, 1, 5, 9))
    for i, seed in enumerate((3, 1, 4, 1, 5, 9)):
        assert sample(p[i : i + 1], generators(seed)) == tokens[i]
    order = [4, 2, 0]
    assert torch.equal(sample(p[order], generators(5, 4, 3)), tokens[order])


@pytest.mark.parametrize("scale", [1e-30, 1, 3])
@pytest.mark.parametrize(("uniform", "expected"), [(0.0, [1, 0, 2]), (1 - 2**-53, [4, 0, 3])])
def test_never_draws_what_has_no_probability(monkeypatch, uniform, expected, scale):
    p = scale * torch.tensor([[0, 0.3, 0, 0.1, 0.6, 0], [1.0, 0, 0, 0, 0, 0], [0, 0, 0.1, 0.9, 0, 0]])
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor([uniform], dtype=torch.float64))
    assert sample(p, generators(0, 0, 0)).tolist() == expected


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [[math.nan, 1.0, 2.0], [math.inf, 1.0, 2.0], [-math.inf] * 3])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.5}, {"min_p": 0.5}, {"top_k": 2}])
def test_refuses_what_is_no_distribution(bad, temperature, filters):
    logits = torch.tensor([[1.0, 2.0, 3.0], bad])
    p = next_token_probabilities(logits, SamplingConfig(temperature=temperature, **filters))
    assert not p[0].isnan().any()
    with pytest.raises(InputError, match=r"row 1 .* not finite"):
        sample(p, generators(0, 1))


def test_each_row_needs_a_generator():
    with pytest.raises(ValueError, match="2 generators for 3"):
        sample(torch.ones(3, 2), generators(0, 1))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", x) for x in (-1, 1e-5, math.inf, math.nan)),
        *(("top_p", x) for x in (0, -0.1, 1.1, math.nan)),
        *(("min_p", x) for x in (-0.1, 1.1, math.nan)),
        *(("repetition_penalty", x) for x in (0, -1, math.inf, math.nan)),
        *(("top_k", -1), ("repetition_window", -1)),
    ],
)
def test_config_says_what_is_wrong(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}; it must be"):
        SamplingConfig(**{name: value})
