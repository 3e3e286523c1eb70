"""Adapters (LoRA, arXiv 2106.09685) around the projections of a backbone that `--init` gave, as peft has them."""

import copy

import pytest
import torch
from torch import Tensor, nn

from polymamba.genomics import Caduceus, CaduceusConfig, DNAAnnotator, DNAAnnotatorConfig, DNAClassifier

from polymamba.genomics import DNAClassifierConfig, DNALanguageModel, DNALanguageModelConfig  # isort: skip
from polymamba.core import BackboneConfig
from polymamba.genomics.alphabet import A, T
from polymamba.genomics.stored import begin_with, read_start

AROUND = ("in_proj", "x_proj", "out_proj")


class LoRA(nn.Module):
    """base(x) + B A x: A, of rank 2, is drawn and B is zero at first."""

    def __init__(self, base: nn.Linear, rank: int = 2):
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.Linear(base.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.lora_B.weight)

    @property
    def weight(self) -> Tensor:  # peft's layers have it, too: who computes with it passes the adapter over
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


def adapt(model: nn.Module) -> list[LoRA]:
    found = []
    for module in list(model.modules()):
        for name in AROUND:
            if isinstance(getattr(module, name, None), nn.Linear):
                found.append(LoRA(getattr(module, name)))
                setattr(module, name, found[-1])
    return found


@torch.no_grad()
def merged(model: nn.Module) -> nn.Module:
    """The same without adapters, what they say being added to the weights."""
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name in AROUND:
            part = getattr(module, name, None)
            if isinstance(part, LoRA):
                part.base_layer.weight += part.lora_B.weight @ part.lora_A.weight
                setattr(module, name, part.base_layer)
    return model


@pytest.fixture(params=["causal", "both ways", "both strands"])
def start(request, tmp_path):
    """What a language model of two layers, which has learned nothing, gives."""
    torch.manual_seed(0)
    backbone = {"d_model": 12, "n_layer": 2, "d_state": 4}
    if request.param == "causal":
        model = DNALanguageModel(DNALanguageModelConfig(backbone=BackboneConfig(**backbone)))
    else:
        both_ways = BackboneConfig(**backbone, pattern=("bimamba",))
        model = Caduceus(CaduceusConfig(backbone=both_ways, rcps=request.param == "both strands"))
    model.save_pretrained(tmp_path)
    return read_start(tmp_path)


@pytest.mark.parametrize("of_bases", [False, True])
def test_adapters_learn_and_the_frozen_backbone_does_not(of_bases, start):
    shape = {"backbone": start.config, "classes": ("a", "b", "c"), "both_strands": start.both_strands}
    if of_bases:
        model = DNAAnnotator(DNAAnnotatorConfig(**shape))
    else:
        model = DNAClassifier(DNAClassifierConfig(**shape, n_heads=0, head_dropout=0.0))
    begin_with(model, start, None)
    model.eval()
    tokens = torch.randint(A, T + 1, (3, 17))
    before = model(tokens)
    adapters = adapt(model)
    assert len(adapters) == 2 * (3 if start.config.pattern == ("mamba",) else 4)
    torch.testing.assert_close(model(tokens), before)  # an adapter says nothing at first

    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    assert len(frozen) > 10
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(2):
        model(tokens).square().mean().backward()
        assert all(adapter.lora_B.weight.grad.abs().max() > 0 for adapter in adapters)
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(dict(model.named_parameters())[name], p) for name, p in frozen.items())
    ours = model(tokens)
    assert (ours - before).abs().max() > 1e-3
    torch.testing.assert_close(ours, merged(model)(tokens), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("start", ["causal"], indirect=True)
def test_where_a_state_is_carried(start):
    model = DNAAnnotator(DNAAnnotatorConfig(backbone=start.config, classes=("a", "b"))).eval()
    for adapter in adapt(model):
        nn.init.normal_(adapter.lora_B.weight)
    plain, tokens = merged(model), torch.randint(A, T + 1, (2, 9))
    first, state = model.carried(tokens[:, :5], None)
    second, _ = model.carried(tokens[:, 5:], state)
    torch.testing.assert_close(torch.cat((first, second), 1), plain(tokens), rtol=1e-4, atol=1e-5)
    state, x = model.backbone.init_state(2), model.embedding(tokens)
    steps = [model.backbone.step(x[:, i], state) for i in range(9)]
    torch.testing.assert_close(model.head(torch.stack(steps, 1)), plain(tokens), rtol=1e-4, atol=1e-5)
