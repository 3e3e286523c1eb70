"""The language model's loss and likeliest tokens without logits: those of the logits, and by a head's own forward."""

import pytest
import torch
import torch.nn.functional as F

from polymamba.core import BackboneConfig, LanguageModel, LanguageModelConfig, graphed, head_loss
from polymamba.kernels import WayOut


def model_and_tokens(dtype: torch.dtype = torch.float32, **options):
    config = LanguageModelConfig(backbone=BackboneConfig(d_model=12, n_layer=2), vocab_size=37, **options)
    tokens = torch.randint(37, (2, 10))
    targets = tokens[:, 1:].clone()
    targets[0, 5:] = -100
    return LanguageModel(config).to(dtype), tokens[:, :-1], targets


def gradients(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}


@pytest.mark.parametrize("tied", [False, True])
def test_loss_is_that_of_the_logits(tied):
    model, tokens, targets = model_and_tokens(tie_embeddings=tied)
    ours = gradients(model, model(tokens, targets=targets))
    theirs = gradients(model, F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()))
    for name, x in theirs.items():
        torch.testing.assert_close(ours[name], x, msg=name)


def test_loss_under_autocast():
    """Products in bfloat16, sums in float32."""
    model, tokens, targets = model_and_tokens()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens, targets=targets)
        logits = model(tokens)
    assert logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()))
    found = gradients(model, loss)
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in found.values())


def test_a_special_head_is_called(monkeypatch):
    model, tokens, targets = model_and_tokens()
    plain, calls = model(tokens, targets=targets), []
    with monkeypatch.context() as patch:
        patch.setattr(head_loss, "linear_cross_entropy", None)
        model.lm_head.register_forward_hook(lambda head, inputs, logits: calls.append(logits))
        loss = model(tokens, targets=targets)
    assert len(calls) == 1
    torch.testing.assert_close(loss, plain)


def test_a_loss_and_nothing_else():
    model, tokens, targets = model_and_tokens()
    with pytest.raises(ValueError, match="give neither return_state nor logits_at"):
        model(tokens, targets=targets, return_state=True)


class Wrapped(torch.nn.Module):
    """A backbone in another module, which knows of a step what it needs."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def step(self, x, state):
        return -self.backbone.step(x, state)


@pytest.mark.parametrize("special", ["plain", "bias", "hook", "adapter", "backbone", "head of more rows"])
def test_the_likeliest_of_a_step(special):
    """Handed over as what is the largest of the logits, whatever makes these."""
    model, tokens, _ = model_and_tokens(tie_embeddings=False)
    states = model.init_state(2), model.init_state(2)
    if special == "backbone":
        model.backbone = Wrapped(model.backbone)
    if special == "head of more rows":
        model.lm_head = torch.nn.Linear(model.lm_head.in_features, 50, bias=False)
    if special == "bias":
        model.lm_head.bias = torch.nn.Parameter(torch.randn(37) * 9)
    elif special == "hook":
        model.lm_head.register_forward_hook(lambda head, inputs, logits: -logits)
    elif special == "adapter":
        model.lm_head = torch.nn.Sequential(model.lm_head, torch.nn.Linear(37, 37))
    own, turn = torch.zeros(2, 2, dtype=torch.int64)
    out = WayOut(own, torch.zeros(2, 2, dtype=torch.int64), turn)
    for token in tokens.T[:4]:
        model.step_likeliest(token, states[0], out)
        assert out.own.equal(model.step(token, states[1]).argmax(1))
    assert out.ring[1].equal(out.own)


def test_whose_step_tells_the_likeliest():
    class Masked(LanguageModel):
        def step(self, tokens, state):
            return super().step(tokens, state).index_fill(1, torch.tensor([3]), -torch.inf)

    model = model_and_tokens()[0]
    assert graphed.tells_the_likeliest(model)
    assert not graphed.tells_the_likeliest(Masked(model.config))
    assert not graphed.tells_the_likeliest(torch.compile(model))  # what wraps a model has its step by another way
    model.step = lambda tokens, state: torch.zeros(len(tokens), 37)
    assert not graphed.tells_the_likeliest(model)


def test_global_hooks_see_all_of_a_step():
    model, tokens, _ = model_and_tokens()
    out, seen = WayOut(*(torch.zeros(*shape, dtype=torch.int64) for shape in ((2,), (2, 2), (2,)))), [[], []]
    for names, step in zip(seen, (model.step, lambda *given: model.step_likeliest(*given, out)), strict=True):
        hook = lambda module, *_, names=names: names.append(type(module).__name__)  # noqa: E731
        handle = torch.nn.modules.module.register_module_forward_hook(hook)
        step(tokens[:, 0], model.init_state(2))
        handle.remove()
    assert "Embedding" in seen[0]
    assert seen[1] == seen[0]


def test_a_graph_is_another_ones_when_a_hook_comes_or_goes():
    model, _, _ = model_and_tokens()
    modules = list(model.modules())
    before = graphed._places(modules)
    handle = model.lm_head.register_forward_hook(lambda *_: None)
    with_hook = graphed._places(modules)
    handle.remove()
    assert before == graphed._places(modules) != with_hook
    model.backbone.forward = model.backbone.forward
    assert graphed._places(modules) != before
