"""The decoder of graphed.py on the CPU, with stand-ins for streams, events and graphs: what it launches and hears.

test_graphed.py has the real ones, for a GPU.
"""

import contextlib

import pytest
import torch

from polymamba.core import BackboneConfig, LanguageModel, LanguageModelConfig, generation, graphed
from polymamba.core.config import SamplingConfig
from polymamba.core.errors import InputError
from polymamba.core.generation import StopFilter, collect, generate
from polymamba.kernels import Journal

PROMPTS = [torch.tensor([3, 1, 4]), torch.tensor([1]), torch.tensor([5, 9, 2, 6])]
LENGTHS = 20, 21, 22, 150  # the last with more uniform numbers than are brought at once
CONFIGS = {"greedy": SamplingConfig(temperature=0), "drawn": SamplingConfig()}


class Still:
    """A stream or an event where all that is launched is done at once."""

    def __init__(self, *_):
        pass

    def record(self, *_):
        pass

    wait_stream = wait_event = synchronize = record


class Graph:
    def replay(self):
        for _ in range(self.n_steps):
            self.step()


@pytest.fixture(params=[1, Journal.PERIOD], ids=["a step a replay", "a period a replay"])
def n_steps(request, monkeypatch):
    """Steps of a graph; the second as if the model kept a journal."""
    n, steps, zeros = request.param, [], torch.zeros

    def run(journal, step):
        steps.append(step)
        for _ in range(n):
            step()
        return n

    @contextlib.contextmanager
    def recording(graph, device):
        yield
        graph.step, graph.n_steps = steps[-1], n

    monkeypatch.setattr(Journal, "run", run)
    monkeypatch.setattr(graphed, "recording", recording)
    monkeypatch.setattr(generation, "serves", lambda device: True)
    monkeypatch.setattr(torch, "zeros", lambda *shape, pin_memory=False, **options: zeros(*shape, **options))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x)
    for name, stand_in in (("Stream", Still), ("current_stream", Still), ("Event", Still), ("CUDAGraph", Graph)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    return n


def model_of(vocab_size=29) -> LanguageModel:
    torch.manual_seed(0)
    backbone = BackboneConfig(d_model=16, n_layer=2, pattern=("mamba", "attention"), n_heads=1)
    model = LanguageModel(LanguageModelConfig(backbone=backbone, vocab_size=vocab_size, tie_embeddings=False))
    model.lm_head.weight.data *= 4  # logits with a spread
    return model.eval()


def one_by_one(monkeypatch, model, *args, **options):
    with monkeypatch.context() as context:
        context.setattr(generation, "serves", lambda device: False)
        return collect(generate(model, *args, **options))


@pytest.mark.parametrize("config", CONFIGS)
def test_same_tokens(config, n_steps, monkeypatch):
    model, config = model_of(), CONFIGS[config]
    for n_new in LENGTHS:
        plain = one_by_one(monkeypatch, model, PROMPTS, n_new, config, seeds=range(3))
        assert collect(generate(model, PROMPTS, n_new, config, seeds=range(3))) == plain
    assert graphed._graphs[model][1].n_steps == n_steps
    stop = [(plain[0][5],), tuple(plain[1][9:11])]
    stopped = collect(generate(model, PROMPTS, LENGTHS[-1], config, seeds=range(3), stop=stop))
    assert stopped == [StopFilter(stop).push_all(tokens)[0] for tokens in plain]


def test_left_early(n_steps):
    """Whatever was launched for one who does not listen on, the next one hears his own."""
    model = model_of()
    whole = collect(generate(model, PROMPTS, 60, seeds=range(3)))
    for n_heard in range(1, 9):
        steps = generate(model, PROMPTS, 60, seeds=range(3))
        heard = collect(next(steps) for _ in range(n_heard))
        steps.close()
        assert heard == [tokens[:n_heard] for tokens in whole]
    assert collect(generate(model, PROMPTS, 60, seeds=range(3))) == whole


def test_refuses_what_cannot_be_sampled_from(n_steps):
    """A token whose embedding is bad: what was drawn before is heard; where it is the last one, nobody is refused."""
    model = model_of(5000)
    tokens = collect(generate(model, PROMPTS, 40, seeds=range(3)))
    others = {*torch.cat(PROMPTS).tolist(), *tokens[0], *tokens[2]}
    for at in range(20, 26):
        assert tokens[1][at] not in {*others, *tokens[1][:at]}
        good = model.embedding.weight[tokens[1][at]].detach().clone()
        with torch.no_grad():
            model.embedding.weight[tokens[1][at]] = torch.nan
        assert collect(generate(model, PROMPTS, at + 1, seeds=range(3))) == [row[: at + 1] for row in tokens]
        steps, heard = generate(model, PROMPTS, 40, seeds=range(3)), []
        with pytest.raises(InputError, match="row 1 of the batch: the model's logits are not finite"):
            heard.extend(steps)
        assert collect(heard) == [row[: at + 1] for row in tokens]
        assert model not in graphed._graphs
        with torch.no_grad():
            model.embedding.weight[tokens[1][at]] = good
        assert collect(generate(model, PROMPTS, 40, seeds=range(3))) == tokens
