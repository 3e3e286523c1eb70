"""Which Blocks come and go together when weights are divided."""

import torch
from torch.distributed.utils import _to_kwargs

from polymamba.core import BackboneConfig, LanguageModel, LanguageModelConfig, MoEConfig, sharded


def language_model(pattern):
    backbone = BackboneConfig(d_model=16, n_layer=6, d_state=2, pattern=pattern, moe=MoEConfig(n_experts=8))
    return LanguageModel(LanguageModelConfig(backbone=backbone, vocab_size=11))


def test_units_are_runs_of_blocks(monkeypatch):
    model = language_model(("mamba",))
    blocks = list(model.backbone.layers)
    size = sum(p.numel() for p in blocks[0].parameters())
    for unit, lengths in ((1, [1] * 6), (size, [1] * 6), (size + 1, [2, 2, 2]), (4 * size, [4, 2]), (9 * size, [6])):
        monkeypatch.setattr(sharded, "UNIT", unit)
        units = sharded._units(model, ())
        assert [len(unit) for unit in units] == lengths
        assert [block for unit in units for block in unit] == blocks


def test_what_is_apart_does_not_count(monkeypatch):
    model = language_model(("mamba", "moe"))
    experts = {p for p in model.parameters() if p.dim() == 3 and len(p) == 8}  # not the convolutions
    monkeypatch.setattr(sharded, "UNIT", sum(p.numel() for p in model.backbone.layers[0].parameters()) + 1)
    assert [len(unit) for unit in sharded._units(model, ())] == [2, 2, 2]
    monkeypatch.setattr(sharded, "UNIT", sharded._size(model.backbone, experts))
    assert [len(unit) for unit in sharded._units(model, experts)] == [6]


def test_states_survive_what_moves_inputs_to_a_gpu():
    state = language_model(("mamba", "moe", "mlp")).init_state(2)
    ((moved,),), _ = _to_kwargs((state,), {}, torch.device("cpu"), False)
    assert [type(layer) for layer in moved] == [type(layer) for layer in state]
