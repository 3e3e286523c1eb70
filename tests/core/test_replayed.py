"""A training step by CUDA graph: on a CPU with a stand-in for the graph, on a GPU as it is, against plain steps."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils import _pytree as pytree

from polymamba.core import (
    BackboneConfig,
    ComputeConfig,
    InputError,
    LanguageModel,
    LanguageModelConfig,
    TrainConfig,
)
from polymamba.core.replayed import MOST_GRAPHS, WARM_UPS, Replayed, _Graph
from polymamba.core.run_folder import RunFolder
from polymamba.core.task import Task
from polymamba.core.train import _Trainer, train_model

CONFIG = TrainConfig(epochs=3, lr=2e-2, save_every=3, cuda_graph=True)
CPU = torch.device("cpu")


class StandIn(Replayed):
    """What a graph does: outputs always in the same memory, and nothing done while it is recorded."""

    n_replays = 0

    def _recorded(self, inputs, structure):
        random = torch.get_rng_state()
        outputs = self.function(pytree.tree_unflatten(inputs, structure))
        torch.set_rng_state(random)

        def replay():
            self.n_replays += 1
            new = self.function(pytree.tree_unflatten(inputs, structure))
            for there, x in zip(pytree.tree_leaves(outputs), pytree.tree_leaves(new), strict=True):
                there.copy_(x)

        return _Graph(inputs, outputs, replay)


class CountUp(Task):
    """Next-token prediction of sequences that count upwards modulo 7, of two lengths."""

    same_kernels = True

    def __init__(self, broken_at: int | None = None):
        self.broken_at, self.n_batches = broken_at, 0

    def plan(self, epoch):
        return np.random.default_rng((5, epoch)).permutation(13).tolist()

    def batch(self, description, epoch):
        self.n_batches += 1
        if self.n_batches == self.broken_at:
            raise KeyboardInterrupt
        starts = np.random.default_rng((description, epoch)).integers(0, 7, (8, 1))
        return torch.from_numpy((starts + np.arange(9 + description % 2)) % 7)

    def loss(self, model, batch):
        return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1).float(), batch[:, 1:].flatten())

    def evaluate(self, model):
        return {"valid_loss": self.loss(model, self.batch(1000, 0).to(next(model.parameters()).device)).item()}


def model() -> LanguageModel:
    torch.manual_seed(2)
    backbone = BackboneConfig(d_model=16, n_layer=2, d_state=4, dropout=0.1)
    return LanguageModel(LanguageModelConfig(backbone=backbone, vocab_size=7))


def train(folder, config, device="cpu", *, task=None, resume=False):
    """(the best epoch's figures, the model)."""
    trained = model()
    run = RunFolder(folder, {}, [], resume=resume)
    compute = ComputeConfig(device=device, seed=1)
    return train_model(trained, task or CountUp(), config, compute, run, resume=resume), trained


def assert_same_bits(a, b):
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(x.cpu(), y.cpu()), f"{name}: {(x.cpu() - y.cpu()).abs().max()}"


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_the_loop_takes_over_what_a_graph_writes_anew(tmp_path, accumulation):
    config = replace(CONFIG, accumulation=accumulation)
    metrics, plain = train(tmp_path / "plain", config)  # on a CPU the flag changes nothing
    ours, task = model(), CountUp()
    trainer = _Trainer(ours, task, config, ComputeConfig(device="cpu", seed=1), RunFolder(tmp_path / "ours", {}, []))
    trainer.replayed = StandIn(trainer.fresh_gradients, CPU)
    assert trainer.run_all() == metrics
    assert trainer.replayed.n_replays > 10
    assert_same_bits(ours, plain)


def test_a_graph_for_each_shape_and_constant_and_not_too_many():
    def function(inputs):
        x, options = inputs
        return x * options["by"]

    replayed = StandIn(function, CPU)
    for _ in range(WARM_UPS + 2):
        for n in range(1, MOST_GRAPHS + 2):
            for by in (2, 3) if n == 1 else (2,):
                x = torch.randn(n)
                assert torch.equal(replayed((x, {"by": by})), x * by)
    assert len(replayed.graphs) == MOST_GRAPHS
    assert replayed.n_replays == 2 * MOST_GRAPHS
    first = replayed((torch.ones(1), {"by": 2}))
    assert replayed((torch.zeros(1), {"by": 2})) is first


def test_what_cannot_be_recorded_is_refused(tmp_path):
    task = CountUp()
    task.same_kernels = False
    with pytest.raises(InputError, match="--cuda-graph"):
        train(tmp_path / "run", CONFIG, task=task)
    with pytest.raises(ValueError, match="gradient_checkpointing"):
        replace(CONFIG, gradient_checkpointing=True)


@pytest.mark.gpu
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_gpu_trains_to_the_same_bits_by_graph(tmp_path, accumulation):
    config = replace(CONFIG, accumulation=accumulation)
    metrics, plain = train(tmp_path / "plain", replace(config, cuda_graph=False), "cuda")
    by_graph, ours = train(tmp_path / "ours", config, "cuda")
    assert by_graph == metrics
    assert_same_bits(ours, plain)


@pytest.mark.gpu
def test_a_gpu_resumes_by_graph_to_the_same_bits(tmp_path):
    metrics, plain = train(tmp_path / "whole", CONFIG, "cuda")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "broken", CONFIG, "cuda", task=CountUp(broken_at=25))
    resumed, ours = train(tmp_path / "broken", CONFIG, "cuda", resume=True)
    assert resumed == metrics
    assert_same_bits(ours, plain)
