"""Speculation against plain twins: the distribution enumerated, the greedy text, each round without state or batch."""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from polymamba.core import BackboneConfig, InputError, LanguageModel, LanguageModelConfig, speculation
from polymamba.core import drafting as drafting_module
from polymamba.core.config import SamplingConfig, SpeculationConfig
from polymamba.core.drafting import LONGEST, SHORTEST, NgramDrafter, what_followed
from polymamba.core.generation import collect, generate
from polymamba.core.sampling import next_token_probabilities, sample
from polymamba.core.speculation import Tally, speculate

GREEDY = SamplingConfig(temperature=0)
SAMPLED = SamplingConfig(temperature=1.5, top_k=20, top_p=0.95, min_p=0.01, repetition_penalty=1.5, repetition_window=6)
LENGTHS = (1, 12, 5, 4, 9)
REREAD = 5  # so few that it happens here, too


class Table:
    """A model of few words: the last two tokens pick a row of a table of logits."""

    def __init__(self, seed: int, vocab_size: int = 3, scale: float = 1.0):
        random = torch.Generator().manual_seed(seed)
        self.logits = scale * torch.randn(vocab_size, vocab_size, vocab_size, generator=random).double()
        self.longest = 0

    def __call__(self, tokens, state=None, *, return_state=False, padding_mask=None, logits_at=None):
        self.longest = max(self.longest, tokens.shape[1])
        before = self.init_state(len(tokens)) if state is None else state
        pair = torch.cat((before["last"], tokens), 1)
        n_real = torch.full((len(tokens),), tokens.shape[1]) if padding_mask is None else padding_mask.sum(1)
        last = pair.gather(1, n_real[:, None] + torch.arange(1))
        logits = self.logits[pair[:, :-1], pair[:, 1:]]
        return logits if logits_at is None else logits[range(len(tokens)), logits_at], {"last": last}

    def step(self, tokens, state):
        logits = self.logits[state["last"][:, 0], tokens]
        state["last"].copy_(tokens[:, None])
        return logits

    def init_state(self, batch_size):
        return {"last": torch.zeros(batch_size, 1, dtype=torch.int64)}


class Opposite(Table):
    """Likes best what the other one likes least."""

    def __init__(self, other: Table):
        self.logits, self.longest = -other.logits, 0


MAMBA, HYBRID = ("mamba",), ("attention", "mamba", "mlp", "attention")


def language_model(seed: int = 0, vocab_size: int = 29, n_layer: int = 2, pattern=MAMBA) -> LanguageModel:
    """In float64, so that the last bits of a matrix product, which depend on the batch, decide no token."""
    torch.manual_seed(seed)
    n_layer = max(n_layer, len(pattern))
    backbone = BackboneConfig(d_model=20, n_layer=n_layer, d_state=5, n_heads=2, pattern=pattern)
    model = LanguageModel(LanguageModelConfig(vocab_size=vocab_size, backbone=backbone, tie_embeddings=False))
    model = model.double().eval()
    torch.nn.init.normal_(model.embedding.weight)
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)
    return model


def like(model: LanguageModel, noise: float) -> LanguageModel:
    """A drafter that is often right."""
    other = language_model(pattern=model.config.backbone.pattern)
    other.load_state_dict(model.state_dict())
    torch.manual_seed(5)
    with torch.no_grad():
        other.lm_head.weight += noise * torch.randn_like(other.lm_head.weight)
    return other


def prompts_of(lengths=LENGTHS, vocab_size: int = 29, period: int = 5) -> list[torch.Tensor]:
    """Somewhat repetitive, so that there is something to look up."""
    random = torch.Generator().manual_seed(1)
    return [torch.randint(vocab_size, (period,), generator=random).repeat(length)[:length] for length in lengths]


def drafters(model):
    return {"ngram": "ngram", "itself": model, "close": like(model, 0.1), "another": language_model(3, n_layer=1)}


def texts(*args, **options) -> list[list[int]]:
    return collect(speculate(*args, **options))


def drafting(draft_length: int, acceptance="exact") -> SpeculationConfig:
    return SpeculationConfig(draft_length=draft_length, acceptance=acceptance)


# The distribution


def enumerated(model: Table, prompt: list[int], length: int, config: SamplingConfig) -> torch.Tensor:
    """The probability of each continuation, (V ** length,), each step from a forward over the whole sequence."""
    chances = []
    for tokens in itertools.product(range(model.logits.shape[0]), repeat=length):
        chance, sequence = 1.0, list(prompt)
        for token in tokens:
            logits = model(torch.tensor([sequence]))[0][:, -1]
            chance *= next_token_probabilities(logits, config, torch.tensor([sequence]))[0, token].item()
            sequence.append(token)
        chances.append(chance)
    return torch.tensor(chances, dtype=torch.float64)


PENALISED = SamplingConfig(repetition_penalty=1.8, repetition_window=2)
FILTERED = SamplingConfig(temperature=0.8, top_k=2, repetition_penalty=1.4)


@pytest.mark.parametrize("draft_length", [1, 3, 6])
@pytest.mark.parametrize("config", [SamplingConfig(), PENALISED, FILTERED], ids=["plain", "penalised", "filtered"])
@pytest.mark.parametrize("drafter", ["ngram", Table(8), Table(9, scale=2.5)], ids=["ngram", "smaller", "surer"])
def test_exact_has_the_distribution_of_the_model(drafter, config, draft_length):
    model, prompt, n_rows, length = Table(7), [1, 0, 1, 2, 1, 1, 1, 1, 1, 0, 1, 2, 1, 1], 4000, 4
    tally = Tally()
    speculated = texts(
        *(model, drafter, [torch.tensor(prompt)] * n_rows, length, config, drafting(draft_length)),
        seeds=range(n_rows),
        tally=tally,
    )
    place = torch.tensor(speculated) @ 3 ** torch.arange(length - 1, -1, -1)
    observed = place.bincount(minlength=3**length)
    expected = enumerated(model, prompt, length, config)
    possible = expected > 0
    assert observed[~possible].sum() == 0
    assert 0 < tally.kept < tally.drafted
    often = n_rows * expected >= 5  # the rest in one class, as the test wants it
    classes = [(observed[often], expected[often]), (observed[~often].sum()[None], expected[~often].sum()[None])]
    f_observed, f_expected = (torch.cat(parts) for parts in zip(*classes, strict=True))
    kept = f_expected > 0
    assert chisquare(f_observed[kept], n_rows * f_expected[kept] / f_expected.sum()).pvalue > 0.01


def test_top3_has_another_distribution():
    """Of four words any draft but the least likely one is kept, however unlikely: the drafter rules."""
    model, surer, n_rows = Table(7, 4), Table(9, 4, scale=8), 3000
    prompts = [torch.tensor([0, 1, 2])] * n_rows
    plain = torch.tensor(collect(generate(model, prompts, 3, seeds=range(n_rows))))[:, 1:]
    for acceptance, differs in (("exact", False), ("top3", True)):
        speculated = texts(model, surer, prompts, 3, speculation=drafting(2, acceptance), seeds=range(n_rows))
        counts = [
            (rows @ torch.tensor([4, 1])).bincount(minlength=16) / n_rows
            for rows in (plain, torch.tensor(speculated)[:, 1:])
        ]
        assert ((counts[0] - counts[1]).abs().sum() > 0.3) == differs


# The very tokens


@pytest.mark.parametrize("config", [GREEDY, replace(GREEDY, repetition_penalty=1.7, repetition_window=3)])
@pytest.mark.parametrize("draft_length", [1, 4, 9])
@pytest.mark.parametrize("drafter", ["ngram", "itself", "close", "another"])
@pytest.mark.parametrize("pattern", [MAMBA, HYBRID])
def test_greedy_is_the_very_text(drafter, draft_length, config, pattern):
    model, prompts = language_model(pattern=pattern), prompts_of()
    plain = collect(generate(model, prompts, 25, config))
    assert texts(model, drafters(model)[drafter], prompts, 25, config, drafting(draft_length)) == plain


@pytest.mark.parametrize("drafter", ["ngram", "model"])
def test_greedy_is_the_very_text_where_a_few_tokens_are_one_call(drafter, monkeypatch):
    """As on a CPU with AVX-512 (kernels/mamba_block/cpu.py), of two prompts, one of which ends before the other."""
    from polymamba.kernels import numba_lanes
    from polymamba.kernels.mamba_block import cpu

    calls, real = [], cpu.forward
    monkeypatch.setattr(cpu, "forward", lambda *given: calls.append(len(given[0])) or real(*given))
    monkeypatch.setattr(cpu, "_processors", lambda: 2)
    torch.manual_seed(11)
    backbone = BackboneConfig(d_model=64, n_layer=3)
    config = LanguageModelConfig(backbone=backbone, vocab_size=29, tie_embeddings=False)
    model, close = LanguageModel(config).eval(), LanguageModel(config).eval()
    torch.nn.init.normal_(model.embedding.weight)
    close.load_state_dict(model.state_dict())
    close.lm_head.weight.data += 0.1 * model.lm_head.weight.std() * torch.randn(29, 64)
    prompts = [torch.arange(40) % 7, (torch.arange(40) + 2) % 5]
    end = [collect(generate(model, prompts, 40, GREEDY))[0][24:26]]
    plain = collect(generate(model, prompts, 40, GREEDY, stop=end))
    assert len(plain[0]) < len(plain[1])
    tally, by = Tally(), "ngram" if drafter == "ngram" else close
    assert collect(speculate(model, by, prompts, 40, GREEDY, drafting(4), stop=end, tally=tally)) == plain
    assert tally.kept > 0
    assert drafter == "ngram" or tally.kept < tally.drafted
    rows = {1} if drafter == "ngram" else {1, 2}  # lookup finds nothing before one has ended
    assert set(calls) == (rows if numba_lanes.AVX512 else set())


@torch.no_grad()
def read_again_for_each_round(model, drafter, prompt, max_new_tokens, config, speculation, seed) -> list[int]:
    """One sequence, no state: the whole of it through model and drafter for every token of every round."""

    def chances(by, tokens, settings=config) -> torch.Tensor:
        logits = by(torch.tensor([tokens]), return_state=True)[0][:, -1]
        return next_token_probabilities(logits, settings, torch.tensor([tokens]))[0]

    tokens, generator, n_unread = prompt.tolist(), torch.Generator().manual_seed(seed), 0
    while len(tokens) < len(prompt) + max_new_tokens:
        drafts, q = [], []
        if n_unread and drafter == "ngram":
            drafts = what_followed("".join(map(chr, tokens)), speculation.draft_length)
            q = [torch.eye(29)[draft] for draft in drafts]
        elif n_unread:
            for _ in range(speculation.draft_length):
                q.append(chances(drafter, tokens + drafts))
                drafts.append(sample(q[-1][None], [generator]).item())
        if n_unread > REREAD:
            drafts, q = [], []
        n_kept = 0
        if speculation.acceptance == "exact":
            for draft, u in zip(drafts, torch.rand(len(drafts), generator=generator, dtype=torch.float64), strict=True):
                if u * q[n_kept][draft] >= chances(model, tokens + drafts[:n_kept])[draft]:
                    break
                n_kept += 1
        else:
            for draft in drafts:
                p = chances(model, tokens + drafts[:n_kept], replace(config, temperature=1, top_k=0, top_p=1, min_p=0))
                if (p > p[draft]).sum() >= 3:
                    break
                n_kept += 1
        p = chances(model, tokens + drafts[:n_kept])
        if n_kept < len(drafts) and speculation.acceptance == "exact":
            p = (p - q[n_kept]).clamp(min=0)
        tokens += drafts[:n_kept] + sample(p[None], [generator]).tolist()
        n_unread = 1 if n_kept == len(drafts) else n_unread + n_kept + 1
    return tokens[len(prompt) :][:max_new_tokens]


@pytest.mark.parametrize("acceptance", ["exact", "top3"])
@pytest.mark.parametrize("config", [SamplingConfig(), SAMPLED, SamplingConfig(repetition_penalty=3)])
@pytest.mark.parametrize("drafter", ["ngram", "close", "another"])
def test_uneven_batch_equals_the_plain_twin(drafter, config, acceptance, monkeypatch):
    monkeypatch.setattr(speculation, "REREAD", REREAD)
    model, prompts, seeds = language_model(), prompts_of((1, 17, 12)), (3, 1, 4)
    drafter, settings = drafters(model)[drafter], drafting(5, acceptance)
    together = texts(model, drafter, prompts, 20, config, settings, seeds=seeds, chunk=4)
    for prompt, seed, tokens in zip(prompts, seeds, together, strict=True):
        assert tokens == read_again_for_each_round(model, drafter, prompt, 20, config, settings, seed)
        assert [tokens] == texts(model, drafter, [prompt], 20, config, settings, seeds=[seed])


@pytest.mark.parametrize(("drafter", "share"), [(Table(7), 1), (Opposite(Table(7)), 0)], ids=["all kept", "none kept"])
@pytest.mark.parametrize("draft_length", [1, 4])
def test_all_and_none_kept(drafter, share, draft_length):
    model, prompts, tally = Table(7), [torch.tensor([0, 1, 2])] * 5, Tally()
    plain = collect(generate(model, prompts, 1 + 100 * (draft_length + 1), GREEDY))
    for n in (1, 2, 100):
        tally = Tally()
        length = 1 + n * (draft_length + 1) if share else 1 + n
        speculated = texts(model, drafter, prompts, length, GREEDY, drafting(draft_length), tally=tally)
        assert speculated == [tokens[:length] for tokens in plain]
        assert tally.kept == share * tally.drafted
        assert tally.tokens_per_forward == pytest.approx(1 + share * draft_length)
        assert tally.forwards == 5 * n


def test_what_is_read_again_is_bounded(monkeypatch):
    model = Table(7)
    plain = collect(generate(model, [torch.tensor([0])], 200, GREEDY))
    for limit in (0, 1, 7):
        monkeypatch.setattr(speculation, "REREAD", limit)
        model.longest, tally = 0, Tally()
        assert texts(model, Opposite(model), [torch.tensor([0])], 200, GREEDY, drafting(4), tally=tally) == plain
        assert model.longest <= limit + 4 + 1
        assert (tally.drafted > 0) == (limit > 0)
    assert model.longest > 7


def test_rounds_without_any_drafts():
    """All tokens differ, so that nothing can be looked up, and the model is asked for one token at a time."""

    class Successor(Table):
        def __init__(self):
            self.logits, self.longest = torch.eye(60).roll(1, 1)[None].expand(60, 60, 60), 0

    tally, model = Tally(), Successor()
    assert texts(model, "ngram", [torch.tensor([2, 3])], 50, GREEDY, tally=tally) == [list(range(4, 54))]
    assert (tally.drafted, tally.forwards, tally.acceptance_rate, tally.tokens_per_forward) == (0, 49, 0, 1)
    assert model.longest == 2, "a forward where a step would do"


@pytest.mark.parametrize("max_new_tokens", [1, 2, 7, 8, 9])
def test_never_more_tokens_than_wanted(max_new_tokens):
    model, prompts = language_model(), prompts_of()
    for drafter in ("ngram", model):
        steps = list(speculate(model, drafter, prompts, max_new_tokens, speculation=drafting(3), seeds=range(5)))
        assert [len(tokens) for tokens in collect(steps)] == [max_new_tokens] * 5
        assert steps[-1].finished == ["length"] * 5


@pytest.mark.parametrize("stop", [[(2,)], [(1, 1)], [(0, 1, 0), (1, 0), (2, 2, 2, 1)]])
@pytest.mark.parametrize("drafter", ["ngram", Table(8)], ids=["ngram", "smaller"])
def test_stop_sequences_inside_drafts(drafter, stop):
    model, prompts = Table(7), prompts_of(range(1, 30), 3)
    free = texts(model, drafter, prompts, 30, seeds=range(29))
    expected = []
    for tokens in free:
        ends = [(n, -len(s)) for n in range(1, 31) for s in stop if tokens[:n][-len(s) :] == list(s)]
        n, negative = min(ends, default=(30, 0))
        expected.append((tokens[: n + negative], "stop" if ends else "length"))
    steps = list(speculate(model, drafter, prompts, 30, seeds=range(29), stop=stop))
    assert collect(steps) == [tokens for tokens, _ in expected]
    assert steps[-1].finished == [reason for _, reason in expected]


def test_seeds_are_each_rows_own():
    model, prompts, seeds, order = language_model(), prompts_of(), (3, 1, 4, 1, 5), [3, 0, 4, 2, 1]
    for drafter in ("ngram", language_model(3)):
        tokens = texts(model, drafter, prompts, 12, seeds=seeds)
        shuffled = texts(model, drafter, [prompts[i] for i in order], 12, seeds=[seeds[i] for i in order])
        assert shuffled == [tokens[i] for i in order]
        assert texts(model, drafter, prompts, 12, seeds=(9, *seeds[1:]))[1:] == tokens[1:]
        assert texts(model, drafter, prompts, 12, seeds=(9, *seeds[1:]))[0] != tokens[0]


# The lookup


@given(st.text("ab", max_size=60) | st.text("abĀ", max_size=20), st.integers(1, 9))
def test_what_followed(text, length):
    for n in range(min(LONGEST, len(text) - 1), SHORTEST - 1, -1):
        ends = [end for end in range(n, len(text)) if text[end - n : end] == text[-n:]]
        if ends:
            expected = text
            for i in range(length):
                expected += expected[ends[-1] + i]
            assert what_followed(text, length) == [ord(c) for c in expected[len(text) :]]
            return
    assert what_followed(text, length) == []


def test_the_lookup_is_bounded(monkeypatch):
    monkeypatch.setattr(drafting_module, "LOOKBACK", 15)
    motif = [1, 2, 3, 4, 5, 6]
    for between, found in (([0] * 3, [[0, 0]]), ([0] * 4, [[]])):
        drafter = NgramDrafter([torch.tensor([7, 7, *motif, *between])], 9, torch.device("cpu"))
        drafter.append([motif])
        drafts = drafter.propose(2, None)
        assert drafts.tokens.tolist() == found
        assert drafts.lengths.tolist() == [len(found[0])]
        assert len(drafter.texts[0]) == 15


@pytest.mark.gpu
@pytest.mark.parametrize("drafter", ["ngram", "close"])
@pytest.mark.parametrize("acceptance", ["exact", "top3"])
def test_on_a_gpu(drafter, acceptance):
    """Rows that keep different numbers of drafts, that have none, and that end at different times."""
    written = []
    for device in ("cpu", "cuda"):
        model = language_model().to(device)
        drafts = "ngram" if drafter == "ngram" else like(language_model(), 0.1).to(device)
        config = SamplingConfig(repetition_penalty=1.2, repetition_window=4)
        settings = drafting(3, acceptance)
        written.append(texts(model, drafts, prompts_of(), 20, config, settings, seeds=range(5), stop=[(2,)]))
    assert written[0] == written[1]


# Mistakes


def test_says_what_is_wrong():
    model, prompts, of_others = language_model(), prompts_of(), (language_model(0, 7), prompts_of(vocab_size=7))
    for error, message, call in (
        (InputError, "drafter has 7 tokens, the model 29", lambda: speculate(model, *of_others, 3)),
        (InputError, "prompt 1 is empty", lambda: speculate(model, "ngram", [prompts[0], prompts[0][:0]], 3)),
        (ValueError, "max_new_tokens is 0", lambda: speculate(model, "ngram", prompts, 0)),
        (ValueError, "draft_length is 0", lambda: drafting(0)),
    ):
        with pytest.raises(error, match=message):
            call()
    for acceptance in ("exact", "top3"):
        model.lm_head.weight.data[3] = torch.nan
        with pytest.raises(InputError, match=r"row 0 .* not finite"):
            texts(model, language_model(3), prompts, 3, speculation=drafting(2, acceptance))
