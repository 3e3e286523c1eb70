"""Divided weights: which Blocks come and go together, and that they are divided again after a failure."""

import contextlib

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.utils import _to_kwargs

from polymamba.core import BackboneConfig, LanguageModel, LanguageModelConfig, MoEConfig, sharded
from polymamba.core.expert_parallel import spread_experts


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


def interrupted():
    """(whether all weights were there inside, whether each is a part again after a failure)."""
    model = language_model(("mamba", "moe"))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sharded.shard(model, mesh, apart=spread_experts(model, mesh))
    with contextlib.suppress(ZeroDivisionError), sharded.all_weights(model):
        whole = not sharded.is_sharded(model)
        raise ZeroDivisionError
    return whole, all(map(sharded.is_part, model.parameters()))


def test_weights_are_divided_again_after_a_failure(in_processes):
    assert in_processes(2, interrupted) == [(True, True)] * 2
