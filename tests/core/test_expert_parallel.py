"""Expert parallelism: experts spread over 2 and 4 processes train as all of them on one."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from polymamba.core import BackboneConfig, LanguageModel, LanguageModelConfig, MoEConfig, aux_loss
from polymamba.core.expert_parallel import spread_experts
from polymamba.core.sharded import clip_gradients

N_STEPS, CLIP = 3, 0.5


def language_model(**settings):
    torch.manual_seed(4)
    moe = MoEConfig(n_experts=8, d_expert=16, **settings)
    backbone = BackboneConfig(d_model=16, n_layer=4, d_state=2, pattern=("mamba", "moe"), moe=moe)
    model = LanguageModel(LanguageModelConfig(backbone=backbone, vocab_size=11))
    for block in model.backbone.layers[1::2]:
        block.mixer.router.weight.data *= 20  # far from balance: some processes get few rows
    return model


def batches(step, n):
    """Each process's tokens; the last one's are few and alike."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randint(11, (2, 19), generator=generator) for _ in range(n - 1)] + [torch.full((1, 5), 3)]


def loss_of(model, tokens, mask=None):
    logits = model(tokens[:, :-1], padding_mask=mask)
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) + aux_loss(model)


def train(model, optimizer, own, n):
    """Losses, each the mean over the batches `own` (of n); clipped steps."""
    losses, norms = [], []
    for step in range(N_STEPS):
        loss = 0.0
        for tokens in own(batches(step, n)):
            part = loss_of(model, tokens)
            (part / len(own(range(n)))).backward()
            loss += part.item() / len(own(range(n)))
        norms.append(clip_gradients(model.parameters(), CLIP).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss)
    return losses, norms


def spread(settings, folder):
    n, rank = dist.get_world_size(), dist.get_rank()
    mesh = init_device_mesh("cpu", (n,), mesh_dim_names=("expert",))
    model = language_model(**settings)
    experts = spread_experts(model, mesh)
    assert all(len(weight.to_local()) == 8 // n for weight in experts)
    fully_shard(model, mesh=mesh, ignored_params=experts)
    losses, norms = train(model, torch.optim.AdamW(model.parameters(), lr=1e-2), lambda x: x[rank : rank + 1], n)
    losses = torch.tensor(losses)
    dist.all_reduce(losses)
    model.save_pretrained(folder)
    return (losses / n).tolist(), norms


@pytest.mark.parametrize(
    ("n", "settings"), [(2, {}), (4, {"top_k": 2, "normalise": True, "capacity_factor": 1.5, "expert": "swiglu"})]
)
def test_spread_experts_are_those_of_one_process(n, settings, tmp_path, in_processes):
    alone = language_model(**settings)
    truth, true_norms = train(alone, torch.optim.AdamW(alone.parameters(), lr=1e-2), lambda x: x, n)
    for losses, norms in in_processes(n, spread, settings, str(tmp_path)):
        assert losses == pytest.approx(truth, abs=1e-5)
        assert norms == pytest.approx(true_norms, rel=1e-4)
    assert min(true_norms) > CLIP  # or clipping would not be seen
    merged = LanguageModel.from_pretrained(tmp_path)
    for (name, found), expected in zip(merged.named_parameters(), alone.parameters(), strict=True):
        assert (found - expected).abs().max() < 2e-5, name


def with_padding():
    """Outputs and gradients of rows that hold padding, and what a number of experts that does not divide is told."""
    mesh = init_device_mesh("cpu", (2,))
    tokens, mask = torch.arange(24).view(2, 12) % 11, torch.arange(12) < torch.tensor([[12], [4]])
    alone, model = language_model(), language_model()
    spread_experts(model, mesh)
    a, b = model(tokens, padding_mask=mask), alone(tokens, padding_mask=mask)
    a.square().mean().backward()
    b.square().mean().backward()
    errors = [(a - b).abs().max().item()]
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        gradient = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        errors.append((gradient - q.grad).abs().max().item())
    try:
        spread_experts(language_model(), init_device_mesh("cpu", (2,)))
        spread_experts(torch.nn.ModuleList([odd()]), mesh)
    except ValueError as error:
        return max(errors), str(error)
    return max(errors), ""


def odd():
    from polymamba.core import MoE

    return MoE(16, MoEConfig(n_experts=7))


def test_with_padding(in_processes):
    for error, said in in_processes(2, with_padding):
        assert error < 1e-6
        assert said == "0: 7 experts do not divide among 2 processes"
