"""Generation against plain twins: each prompt alone, the whole sequence read again for every token, official tokens."""

import functools
import itertools
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils import _pytree as pytree

import polymamba
from polymamba.core import BackboneConfig, InputError, KVCache, LanguageModel, LanguageModelConfig
from polymamba.core.config import SamplingConfig
from polymamba.core.generation import (
    StopFilter,
    collect,
    generate,
    load_state,
    prefill,
    save_state,
    select_state,
)
from polymamba.core.sampling import next_token_probabilities, sample

GOLDEN = Path(__file__).parents[1] / "golden"
LENGTHS = (1, 12, 5, 4, 9)  # with pieces of 4: ends inside a piece, at its end, one past it
SEEDS = (3, 1, 4, 1, 5)
GREEDY = SamplingConfig(temperature=0)
SAMPLED = SamplingConfig(temperature=1.5, top_k=20, top_p=0.95, min_p=0.01, repetition_penalty=1.5, repetition_window=6)


MAMBA, HYBRID, OTHERS = ("mamba",), ("mamba", "attention", "mlp", "attention"), ("lru", "moe", "mamba+attention+moe")


def language_model(pattern=MAMBA, vocab_size: int = 29) -> LanguageModel:
    """In float64, so that the last bits of a matrix product, which depend on the batch, decide no token."""
    torch.manual_seed(0)
    backbone = BackboneConfig(d_model=24, n_layer=max(2, len(pattern)), d_state=5, n_heads=2, pattern=pattern)
    model = LanguageModel(LanguageModelConfig(vocab_size=vocab_size, backbone=backbone, tie_embeddings=False))
    model = model.double().eval()
    torch.nn.init.normal_(model.embedding.weight)
    torch.nn.init.normal_(model.lm_head.weight, std=0.5)  # far from uniform
    return model


def prompts_of(lengths=LENGTHS, vocab_size: int = 29) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(1)
    return [torch.randint(vocab_size, (length,), generator=random) for length in lengths]


class Counter:
    """A model in whole numbers: the state is the sum of all tokens, which picks a row of a table of logits."""

    def __init__(self, vocab_size: int = 7):
        self.table = torch.randn(997, vocab_size, generator=torch.Generator().manual_seed(2))
        self.longest, self.batches = 0, []

    def __call__(self, tokens, state=None, *, return_state=False, padding_mask=None, logits_at=None):
        self.longest = max(self.longest, tokens.shape[1])
        if padding_mask is not None:
            tokens = tokens.masked_fill(~padding_mask, 0)
        sums = (tokens + 1 if padding_mask is None else tokens + padding_mask.long()).cumsum(1)
        sums = sums if state is None else sums + state["sum"][:, None]
        wanted = sums if logits_at is None else sums[range(len(sums)), logits_at]
        return self.table[wanted % 997], {"sum": sums[:, -1].clone()}

    def step(self, tokens, state):
        self.batches.append(len(tokens))
        state["sum"] += tokens + 1
        return self.table[state["sum"] % 997]

    def init_state(self, batch_size):
        return {"sum": torch.zeros(batch_size, dtype=torch.int64)}


@torch.no_grad()
def read_again_for_each_token(model, prompt, max_new_tokens, config, seed) -> list[int]:
    """No state, no batch: the whole sequence through the model for every token."""
    tokens, generator = prompt.tolist(), torch.Generator().manual_seed(seed)
    for _ in range(max_new_tokens):
        logits = model(torch.tensor([tokens]), return_state=True)[0][:, -1]
        p = next_token_probabilities(logits, config, torch.tensor([tokens]))
        tokens += sample(p, [generator]).tolist()
    return tokens[len(prompt) :]


def leaves(state) -> list[torch.Tensor]:
    return pytree.tree_leaves(state)


def assert_same_state(a, b):
    """Of a cache, what is in it: there may be more room in one than in the other."""
    for x, y in zip(
        *(pytree.tree_leaves(state, is_leaf=lambda s: isinstance(s, KVCache)) for state in (a, b)), strict=True
    ):
        if isinstance(x, KVCache):
            assert torch.equal(x.length, y.length)
            real = [torch.arange(cache.keys.shape[1]) < cache.length[:, None] for cache in (x, y)]
            x, y = ([cache.keys[mask], cache.values[mask]] for cache, mask in zip((x, y), real, strict=True))
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


@functools.cache
def each_alone(pattern, config) -> list[list[int]]:
    """What comes of each prompt by the plain twin; the same by generation of that prompt alone."""
    model, alone = language_model(pattern), []
    for prompt, seed in zip(prompts_of(), SEEDS, strict=True):
        alone.append(read_again_for_each_token(model, prompt, 15, config, seed))
        assert alone[-1:] == collect(generate(model, [prompt], 15, config, seeds=[seed]))
    return alone


@pytest.mark.parametrize("config", [GREEDY, SAMPLED, SamplingConfig(repetition_penalty=3)])
@pytest.mark.parametrize("chunk", [1, 4, 2048])
@pytest.mark.parametrize("pattern", [MAMBA, HYBRID, OTHERS])
def test_uneven_batch_equals_the_plain_twin(config, chunk, pattern):
    together = collect(generate(language_model(pattern), prompts_of(), 15, config, seeds=SEEDS, chunk=chunk))
    assert together == each_alone(pattern, config)
    assert len({tuple(tokens) for tokens in together}) > 2


@pytest.mark.parametrize("window", [0, 1, 3, 1000])
def test_repetition_window(window):
    config = SamplingConfig(temperature=0, repetition_penalty=1.7, repetition_window=window)
    model, prompts = language_model(), prompts_of()
    together = collect(generate(model, prompts, 20, config))
    for prompt, tokens in zip(prompts, together, strict=True):
        assert tokens == read_again_for_each_token(model, prompt, 20, config, 0)
    assert (together != collect(generate(model, prompts, 20, GREEDY))) or window == 1


@pytest.mark.parametrize(
    ("kind", "name", "key"),
    [("mamba-ssm", "mamba1_lm", "gen.greedy_sequences"), ("hf-mamba", "mamba_hf", "gen.sequences")],
)
@pytest.mark.parametrize("chunk", [2, 2048])
def test_greedy_tokens_are_the_official_ones(kind, name, key, chunk):
    config = json.loads((GOLDEN / name / "config.json").read_text())
    model = polymamba.convert(kind, load_file(GOLDEN / name / "weights.safetensors"), config).eval()
    golden = load_file(GOLDEN / name / "io.safetensors")[key]
    new = collect(generate(model, list(golden[:, :6]), golden.shape[1] - 6, GREEDY, chunk=chunk))
    assert new == golden[:, 6:].tolist()


@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 12, 100])
@pytest.mark.parametrize("pattern", [MAMBA, HYBRID, OTHERS])
def test_prefill_equals_steps_and_one_shot(chunk, pattern):
    model, prompts = language_model(pattern), prompts_of()
    logits, state = prefill(model, prompts, chunk=chunk)
    for row, prompt in enumerate(prompts):
        stepped = model.init_state(1)
        for token in prompt:
            last = model.step(token[None], stepped)
        with torch.no_grad():
            whole, at_once = model(prompt[None], return_state=True)
        for expected in (last[0], whole[0, -1]):
            torch.testing.assert_close(logits[row], expected, rtol=0, atol=1e-12)
        for expected in (stepped, at_once):
            assert_same_state(select_state(state, [row]), expected)
    assert all(part.is_contiguous() for part in leaves(state))


def test_prefill_makes_logits_of_the_last_tokens_alone():
    model, prompts, seen = language_model(), prompts_of(), []
    model.lm_head.register_forward_hook(lambda head, inputs, logits: seen.append(tuple(inputs[0].shape)))
    prefill(model, prompts, chunk=10)
    assert seen == [(5, 24), (1, 24)]


@pytest.mark.parametrize("chunk", [2, 100])
@pytest.mark.parametrize("pattern", [MAMBA, HYBRID, OTHERS])
def test_a_state_continues_and_is_not_changed(chunk, pattern):
    model, prompts = language_model(pattern), prompts_of((9, 4, 6))
    _, state = prefill(model, [prompt[:3] for prompt in prompts])
    kept = [part.clone() for part in leaves(state)]
    rest = [prompt[3:] for prompt in prompts]
    plain = SamplingConfig(temperature=0.8)
    whole = collect(generate(model, prompts, 10, plain, seeds=SEEDS[:3]))
    for _ in range(2):
        assert collect(generate(model, rest, 10, plain, seeds=SEEDS[:3], state=state, chunk=chunk)) == whole
    for part, before in zip(leaves(state), kept, strict=True):
        assert torch.equal(part, before)


@pytest.mark.parametrize("pattern", [MAMBA, HYBRID, OTHERS])
def test_fork_and_restore(tmp_path, pattern):
    model, prompt = language_model(pattern), prompts_of((11,))[0]
    whole = collect(generate(model, [prompt] * 4, 8, seeds=[0, 1, 2, 3]))
    assert len({tuple(tokens) for tokens in whole}) > 1
    _, state = prefill(model, [prompt[:-1]])
    save_state(tmp_path / "state.safetensors", state)
    for once in (state, load_state(tmp_path / "state.safetensors", model)):
        forked = select_state(once, [0] * 4)
        assert collect(generate(model, [prompt[-1:]] * 4, 8, seeds=[0, 1, 2, 3], state=forked)) == whole
    _, states = prefill(model, prompts_of())
    save_state(tmp_path / "state.safetensors", select_state(states, [4, 2]))
    assert_same_state(load_state(tmp_path / "state.safetensors", model), select_state(states, [4, 2]))
    forked = select_state(states, [1, 1])
    model.step(torch.tensor([0, 1]), forked)
    first = leaves(forked)[0]
    assert not torch.equal(first[0], first[1]), "a fork shares memory"
    assert [type(layer) for layer in forked] == [type(layer) for layer in states]


def test_a_model_that_remembers_nothing():
    """A backbone of MLPs alone: its state has no tensors."""
    model, prompts = language_model(("mlp",)), prompts_of()
    together = collect(generate(model, prompts, 6, GREEDY, chunk=4))
    for prompt, tokens in zip(prompts, together, strict=True):
        assert tokens == read_again_for_each_token(model, prompt, 6, GREEDY, 0)


def test_a_seed_out_of_range_is_found_before_the_prompts_are_read():
    read = []
    with pytest.raises((RuntimeError, OverflowError, ValueError)):
        generate(language_model(), prompts_of()[:3], 12, seeds=[0, 2**70, 1], advance=read.append)
    assert not read


def test_seeds_are_each_rows_own():
    model, prompts, order = language_model(), prompts_of(), [3, 0, 4, 2, 1]
    tokens = collect(generate(model, prompts, 12, seeds=SEEDS))
    shuffled = collect(generate(model, [prompts[i] for i in order], 12, seeds=[SEEDS[i] for i in order]))
    assert shuffled == [tokens[i] for i in order]
    assert collect(generate(model, prompts[:2], 12, seeds=SEEDS[:2])) == tokens[:2]
    assert collect(generate(model, prompts, 12, seeds=(9, *SEEDS[1:])))[1:] == tokens[1:]
    assert collect(generate(model, prompts, 12, seeds=(9, *SEEDS[1:])))[0] != tokens[0]


def test_without_seeds_torchs_generator_decides():
    model, prompts = language_model(), [prompts_of()[1]] * 2
    first, second = (collect(generate(model, prompts, 12)) for _ in range(2))
    torch.manual_seed(0)
    again = collect(generate(model, prompts, 12))
    torch.manual_seed(0)
    assert collect(generate(model, prompts, 12)) == again
    assert first != second
    assert first[0] != first[1]


def end_of(tokens: list[int], stop) -> tuple[list[int], str]:
    """What is left of a continuation, and why it ended: at the first token that completes a stop sequence."""
    for n in range(1, len(tokens) + 1):
        ended = [len(s) for s in stop if tokens[:n][-len(s) :] == list(s)]
        if ended:
            return tokens[: n - max(ended)], "stop"
    return tokens, "length"


@pytest.mark.parametrize("stop", [[(2,)], [(1, 1)], [(0, 1, 0), (1, 0), (6, 5, 4, 3)], [(3, 3, 3, 3, 3, 3)]])
def test_stop_sequences(stop):
    model, prompts = Counter(), prompts_of(range(1, 40), 7)
    config = SamplingConfig(repetition_penalty=1.3, repetition_window=4)
    free = collect(generate(model, prompts, 30, config, seeds=range(39)))
    expected = [end_of(tokens, stop) for tokens in free]
    model.batches.clear()
    steps = list(generate(model, prompts, 30, config, seeds=range(39), stop=stop))
    assert collect(steps) == [tokens for tokens, _ in expected]
    assert steps[-1].finished == [reason for _, reason in expected]
    # Who has finished leaves the batch, and says nothing more.
    assert model.batches == [step.finished.count(None) for step in steps[:-1]]
    for before, after in itertools.pairwise(steps):
        assert all(not after.tokens[i] for i, reason in enumerate(before.finished) if reason)
    if len(stop) > 1:
        assert {reason for _, reason in expected} == {"stop", "length"}


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), max_size=4),
    st.lists(st.integers(0, 2), max_size=25),
)
def test_nothing_is_held_back_longer_than_needed(stop, tokens):
    """At every prefix: what may begin a stop sequence is held, all else is out, and nothing is lost."""
    filter, out = StopFilter(stop), []
    for n, token in enumerate(tokens, start=1):
        released, stopped = filter.push(token)
        out += released
        left, reason = end_of(tokens[:n], stop)
        if reason == "stop":
            assert (out, stopped, filter.held) == (left, True, [])
            return
        begins = [k for k in range(1, n + 1) if any(len(s) > k and s[:k] == tokens[n - k : n] for s in stop)]
        n_held = max(begins, default=0)
        assert not stopped
        assert out == tokens[: n - n_held]
        assert out + filter.held == tokens[:n]


def test_streams_step_by_step():
    model = Counter()
    steps = generate(model, prompts_of((3, 8), 7), 5, seeds=(0, 1))
    for n in range(5):
        step = next(steps)
        assert [len(tokens) for tokens in step.tokens] == [1, 1]
        assert step.finished == ([None, None] if n < 4 else ["length", "length"])
        assert len(model.batches) == n, "computed ahead of what was asked for"
    assert next(steps, None) is None


def test_a_long_prompt_in_bounded_memory():
    """10 MB beside a short one; the state is a sum, so the answer is known."""
    model = Counter()
    long = (torch.arange(10_000_019) % 251 % 7).to(torch.uint8)
    read = []
    logits, state = prefill(model, [long, long[:5]], chunk=65536, advance=read.append)
    assert model.longest == 65536
    assert (read[:2], sum(read)) == ([65541, 65536], len(long) + 5)
    assert state["sum"].tolist() == [int(p.long().sum()) + len(p) for p in (long, long[:5])]
    assert torch.equal(logits, model.table[state["sum"] % 997])


def test_a_repetition_penalty_over_a_long_prompt():
    """Only which tokens occurred matters, so its memory does not grow with the prompt."""
    model, prompts = Counter(), [torch.arange(300_000).remainder(3).to(torch.uint8), torch.tensor([5, 0])]
    config = SamplingConfig(temperature=0, repetition_penalty=1e6)
    first = next(generate(model, prompts, 4, config)).tokens
    for prompt, tokens in zip(prompts, first, strict=True):
        logits = prefill(model, [prompt])[0]
        assert tokens == next_token_probabilities(logits, config, prompt[None].long()).argmax(-1).tolist()


def test_prompts_of_any_integers_in_pieces():
    model, prompt = language_model(), prompts_of()[1]
    types = torch.int64, torch.int32, torch.uint8, torch.int16
    given = [prompt.to(dtype) for dtype in types] + [prompt[:-1].to(torch.int32)]
    expected = collect(generate(model, [prompt] * 4 + [prompt[:-1]], 6, seeds=range(5)))
    for some in (slice(4), slice(5)):  # of one length and of several
        found = collect(generate(model, given[some], 6, seeds=range(5)[some], chunk=5))
        assert found == expected[some]


def test_says_what_is_wrong():
    model, prompts = language_model(), prompts_of()
    _, state = prefill(model, prompts)
    for error, message, call in (
        (InputError, "prompt 1 is empty", lambda: generate(model, [prompts[0], prompts[0][:0]], 3)),
        (InputError, "stop sequence is empty", lambda: generate(model, prompts, 3, stop=[(1,), ()])),
        (ValueError, "no prompts", lambda: generate(model, [], 3)),
        (ValueError, r"prompt 0 is torch.int64 \(1, 12\)", lambda: generate(model, [prompts[1][None]], 3)),
        (ValueError, "prompt 0 is torch.float32", lambda: generate(model, [torch.ones(3)], 3)),
        (ValueError, "max_new_tokens is 0", lambda: generate(model, prompts, 0)),
        (ValueError, "chunk is 0", lambda: generate(model, prompts, 3, chunk=0)),
        (ValueError, "2 seeds for 5 prompts", lambda: generate(model, prompts, 3, seeds=(1, 2))),
        (ValueError, r"\[5\] rows for 2 prompts", lambda: generate(model, prompts[:2], 3, state=state)),
        (ValueError, "training mode", lambda: generate(language_model().train(), prompts, 3)),
    ):
        with pytest.raises(error, match=message):
            call()
    model.lm_head.weight.data[3] = torch.nan
    with pytest.raises(InputError, match=r"row 0 .* not finite"):
        collect(generate(model, prompts, 3))


def test_says_what_is_wrong_with_a_state_file(tmp_path):
    model = language_model()
    path = tmp_path / "state.safetensors"
    with pytest.raises(InputError, match=r"state.safetensors: no state can be read"):
        load_state(path, model)
    path.write_bytes(b"no state")
    with pytest.raises(InputError, match=r"state.safetensors: no state can be read"):
        load_state(path, model)
    save_file({"weight": torch.zeros(3)}, path)
    with pytest.raises(InputError, match=r"state.safetensors: not a state of this model"):
        load_state(path, model)
    save_state(path, prefill(language_model(HYBRID), prompts_of())[1])
    with pytest.raises(InputError, match=r"state.safetensors: not a state of this model"):
        load_state(path, model)
    save_state(path, prefill(model, prompts_of())[1])
    with pytest.raises(InputError, match=r"state.safetensors: not a state of this model"):
        load_state(path, model.float())  # another dtype
