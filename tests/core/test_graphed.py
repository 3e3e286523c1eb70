"""Decoding by CUDA graph against decoding step by step."""

from importlib import import_module

import pytest
import torch
from torch.utils import _pytree as pytree

from polymamba.core import BackboneConfig, LanguageModel, LanguageModelConfig, generation, graphed
from polymamba.core.config import SamplingConfig
from polymamba.core.errors import InputError
from polymamba.core.generation import StopFilter, collect, generate, prefill
from polymamba.kernels import Journal

pytestmark = pytest.mark.gpu
PATTERNS = [("mamba",), ("mamba", "attention", "mlp"), ("mamba", "moe", "lru")]
CONFIGS = [
    SamplingConfig(temperature=0),
    SamplingConfig(),
    SamplingConfig(temperature=0.8, top_k=9, top_p=0.9, min_p=0.02, repetition_penalty=1.3, repetition_window=5),
    SamplingConfig(repetition_penalty=1.2),
]


def model_of(pattern=("mamba",), vocab_size=29) -> LanguageModel:
    torch.manual_seed(0)
    backbone = BackboneConfig(d_model=48, n_layer=3, pattern=pattern, n_heads=3)
    model = LanguageModel(LanguageModelConfig(backbone=backbone, vocab_size=vocab_size, tie_embeddings=False))
    model.lm_head.weight.data *= 4  # logits with a spread
    return model.cuda().eval()


def prompts_of(n=3):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(29, (length,), generator=generator) for length in (5, 1, 13, 2, 7)[:n]]


def both(monkeypatch, model, *args, **options):
    """The same call by graph and without."""
    by_graph = collect(generate(model, *args, **options))
    monkeypatch.setattr(generation, "GRAPHED", 10**9)
    plain = collect(generate(model, *args, **options))
    monkeypatch.undo()
    return by_graph, plain


@pytest.mark.parametrize("config", CONFIGS, ids=["greedy", "plain", "filtered", "penalised"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=["mamba", "hybrid", "others"])
def test_same_tokens(pattern, config, monkeypatch):
    """More tokens than there are uniform numbers in a block; sequences that stop at different times."""
    model = model_of(pattern)
    for stop in ([], [(3,), (7, 1)]):
        by_graph, plain = both(monkeypatch, model, prompts_of(), 150, config, seeds=range(3), stop=stop)
        assert by_graph == plain


def test_graph_is_used_again_and_not_by_two(monkeypatch):
    model, config = model_of(), SamplingConfig()
    made = []
    capture = graphed._StepGraph
    monkeypatch.setattr(graphed, "_StepGraph", lambda *args: made.append(capture(*args)) or made[-1])
    alone = [collect(generate(model, prompts_of(), 40, config, seeds=range(s, s + 3))) for s in (0, 10)]
    assert len(made) == 1
    streams = [generate(model, prompts_of(), 40, config, seeds=range(s, s + 3)) for s in (0, 10)]
    assert [collect(steps) for steps in zip(*zip(*streams, strict=True), strict=True)] == alone
    assert len(made) == 2
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(0).clone())  # in place: the graph sees it
    assert collect(generate(model, prompts_of(), 40, config, seeds=range(3))) != alone[0]
    assert len(made) == 2
    model.double().float()  # other memory
    collect(generate(model, prompts_of(), 40, config, seeds=range(3)))
    assert len(made) == 3


def test_prompts_of_a_shape_that_was_just_read(monkeypatch):
    """Read by a graph: to the bit the forward's results, which a later reading leaves alone."""
    model, made = model_of(), []
    capture = graphed._ReadingGraph
    monkeypatch.setattr(graphed, "_ReadingGraph", lambda *args: made.append(capture(*args)) or made[-1])
    first, second = (list(torch.randint(29, (3, 40), generator=torch.Generator().manual_seed(s))) for s in (1, 2))

    def leaves(result):
        return [x.clone() for x in pytree.tree_leaves(result)]

    plain = leaves(prefill(model, first))
    assert not made
    by_graph = prefill(model, first)
    other = leaves(prefill(model, second))
    assert len(made) == 1
    assert all(map(torch.equal, pytree.tree_leaves(by_graph), plain))
    with torch.no_grad():
        model.lm_head.weight.mul_(2)  # in place: the graph sees it
    assert torch.equal(prefill(model, first)[0], 2 * plain[0])
    model.lm_head.weight.data.div_(2)
    handle = model.backbone.layers[0].register_forward_hook(lambda *_: None)  # would not be called
    assert all(map(torch.equal, leaves(prefill(model, second)), other))
    handle.remove()
    prefill(model, [prompt[:39] for prompt in first])  # another shape: the graph is let go
    assert len(made) == 1


def test_graphs_of_inference_mode_and_of_parts_that_may_be_switched(monkeypatch):
    model, made = model_of(), []
    capture = graphed._ReadingGraph
    monkeypatch.setattr(graphed, "_ReadingGraph", lambda *args: made.append(capture(*args)) or made[-1])
    prompts = list(torch.randint(29, (3, 40), generator=torch.Generator().manual_seed(1)))
    with torch.inference_mode():
        logits = [prefill(model, prompts)[0].clone() for _ in range(2)]
    assert len(made) == 1
    logits += [prefill(model, prompts)[0] for _ in range(3)]  # what was recorded in it cannot be written outside
    assert len(made) == 2
    assert all(torch.equal(logits[0], other) for other in logits)

    class Switched(torch.nn.Linear):
        on = True

        def forward(self, x):
            return super().forward(x) if self.on else torch.zeros_like(x)

    block = model.backbone.layers[0].mixer
    wide = block.out_proj.in_features
    block.out_proj = torch.nn.Sequential(Switched(wide, wide).cuda(), block.out_proj)
    before = [prefill(model, prompts)[0] for _ in range(3)][-1]
    tokens = collect(generate(model, prompts, 20, seeds=range(3)))
    block.out_proj[0].on = False
    assert not torch.equal(prefill(model, prompts)[0], before)
    by_graph, plain = both(monkeypatch, model, prompts, 20, seeds=range(3))
    assert by_graph == plain != tokens


@pytest.mark.parametrize("n", [3, 20])
def test_the_stack_in_bf16(n, monkeypatch):
    """Many sequences' kernels: the same tokens by graph and without; short of rounding, the logits of a forward."""
    torch.manual_seed(0)
    backbone = BackboneConfig(d_model=256, n_layer=3)
    model = LanguageModel(LanguageModelConfig(backbone=backbone, vocab_size=64, tie_embeddings=False))
    model = model.cuda().bfloat16().eval()
    tokens = torch.randint(64, (n, 30), generator=torch.Generator().manual_seed(3))
    for config in CONFIGS[:2]:
        by_graph, plain = both(monkeypatch, model, list(tokens), 40, config, seeds=range(n))
        assert by_graph == plain
    _, state = prefill(model, list(tokens[:, :20]))
    for i in range(20, 30):
        logits = model.step(tokens[:, i].cuda(), state)
    whole, _ = prefill(model, list(tokens))
    assert ((logits - whole).abs().max() / whole.abs().max()).item() < 2e-2


def wide_model(pattern=("mamba",), vocab_size=64) -> LanguageModel:
    """Of whose states those of many sequences do not go back to memory with each token."""
    torch.manual_seed(0)
    backbone = BackboneConfig(d_model=1280, n_layer=2, pattern=pattern, n_heads=10)
    model = LanguageModel(LanguageModelConfig(backbone=backbone, vocab_size=vocab_size, tie_embeddings=False))
    return model.cuda().bfloat16().eval()


def some_prompts(n, length=30, vocab_size=64):
    return list(torch.randint(vocab_size, (n, length), generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("n", [20, 45, 70])
@pytest.mark.parametrize("config", CONFIGS[:3], ids=["greedy", "plain", "filtered"])
def test_with_a_journal(n, config, monkeypatch):
    """The same tokens by graph and without, whatever number of tokens; and where sequences stop within a replay."""
    model, made, prompts = wide_model(), [], some_prompts(n)
    capture = graphed._StepGraph
    for n_new in (40, 41, 42, 150):
        monkeypatch.setattr(graphed, "_StepGraph", lambda *args: made.append(capture(*args)) or made[-1])
        by_graph, plain = both(monkeypatch, model, prompts, n_new, config, seeds=range(n))
        assert by_graph == plain
    assert len(made) == 1
    assert made[0].n_steps == Journal.PERIOD
    stop = [(3,), (7, 1)]
    stopped = collect(generate(model, prompts, 150, config, seeds=range(n), stop=stop))
    assert stopped == [StopFilter(stop).push_all(tokens)[0] for tokens in plain]
    assert len(set(map(len, stopped))) > 1
    for n_heard in (2, 5):  # and is left then
        steps = generate(model, prompts, 150, config, seeds=range(n))
        heard = collect(next(steps) for _ in range(n_heard))
        steps.close()
        assert heard == [tokens[:n_heard] for tokens in plain]
    assert collect(generate(model, prompts, 150, config, seeds=range(n))) == plain


def test_a_journal_and_a_state_that_grows(monkeypatch):
    """As far as the room that the graph has for it, and some tokens further: the same tokens as without a journal."""
    found, prompts, cuda_halves = [], some_prompts(20), import_module("polymamba.kernels.mamba_step.cuda_halves")
    for fewest in (1, 10**9):
        monkeypatch.setattr(cuda_halves, "FEWEST_IN_JOURNAL", fewest)
        model = wide_model(("mamba", "attention"))
        lengths = range(graphed.ROOM - 32, graphed.ROOM - 27)
        found.append([collect(generate(model, prompts, n_new, CONFIGS[0])) for n_new in lengths])
    assert found[0] == found[1]


def test_a_journal_that_finds_no_room(monkeypatch):
    asked, made, capture = [], [], graphed._StepGraph

    def no_room(*_):
        asked.append(1)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Journal, "page_of", no_room)
    monkeypatch.setattr(graphed, "_StepGraph", lambda *args: made.append(capture(*args)) or made[-1])
    by_graph, plain = both(monkeypatch, wide_model(), some_prompts(20), 20, seeds=range(20))
    assert by_graph == plain
    assert len(asked) == 1
    assert made[0].n_steps == 1


def test_what_nobody_listened_to_is_not_left_behind():
    """Logits that are not finite in a step after the last that was asked for: the graph is not used again."""
    model, prompts = wide_model(("mamba", "attention"), 5000), some_prompts(20, 5, 5000)
    tokens = collect(generate(model, prompts, 40, seeds=range(20)))
    last, n_new = next(
        (row[n], n + 1)
        for row in tokens
        for n in range(20, 39)
        if n % Journal.PERIOD and all(row[n] not in other[: n + (other is not row)] for other in tokens)
        if row[n] not in torch.cat(prompts).tolist()
    )
    good = model.embedding.weight[last].detach().clone()
    with torch.no_grad():
        model.embedding.weight[last] = torch.nan
    assert collect(generate(model, prompts, n_new, seeds=range(20))) == [row[:n_new] for row in tokens]
    assert model not in graphed._graphs
    with torch.no_grad():
        model.embedding.weight[last] = good
    assert collect(generate(model, prompts, 40, seeds=range(20))) == tokens


def test_from_a_state(monkeypatch):
    model = model_of(PATTERNS[1])
    _, state = prefill(model, prompts_of())
    more = [torch.tensor([4, 8]), torch.tensor([1]), torch.tensor([2, 2, 2])]
    by_graph, plain = both(monkeypatch, model, more, 30, seeds=range(3), state=state)
    assert by_graph == plain


@pytest.mark.parametrize("kind", ["mamba", "hybrid", "wide"])
def test_refuses_what_cannot_be_sampled_from(kind):
    """Row 1 alone comes to a token whose embedding is bad, after some steps or in its prompt; nothing is left of it."""
    if kind == "wide":
        model, prompts = wide_model(vocab_size=5000), some_prompts(16, 5, 5000)
    else:
        model, prompts = model_of(PATTERNS[1 if kind == "hybrid" else 0], vocab_size=500), prompts_of(2)
    seeds = range(len(prompts))
    first, second, *others = collect(generate(model, prompts, 40, seeds=seeds))
    harmless = {*torch.cat(prompts).tolist(), *first, *second[:3], *(token for tokens in others for token in tokens)}
    bad = next(token for token in second if token not in harmless)
    good = model.embedding.weight[bad].detach().clone()
    with torch.no_grad():
        model.embedding.weight[bad] = torch.nan
    for more in ([], [bad]):
        given = [prompts[0], torch.tensor([*prompts[1].tolist(), *more]), *prompts[2:]]
        with pytest.raises(InputError, match="row 1 of the batch: the model's logits are not finite"):
            collect(generate(model, given, 40, seeds=seeds))
    with torch.no_grad():
        model.embedding.weight[bad] = good
    assert collect(generate(model, prompts, 40, seeds=seeds)) == [first, second, *others]
