"""The training loop on a toy task: learns, logs, stops early, and resumes to the same bits."""

import itertools
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from polymamba.core import (
    BackboneConfig,
    ComputeConfig,
    InputError,
    LanguageModel,
    LanguageModelConfig,
    MoEConfig,
    TrainConfig,
)
from polymamba.core.optim import learning_rate, parameter_groups, warmup_cosine
from polymamba.core.run_folder import RunFolder
from polymamba.core.task import Task
from polymamba.core.train import train_model

CPU = ComputeConfig(device="cpu", seed=1)


class CountUp(Task):
    """Next-token prediction of sequences that count upwards modulo 7."""

    def __init__(self, n_batches: int = 6, broken_at: int | None = None):
        self.n_batches, self.broken_at, self.n_losses = n_batches, broken_at, 0

    def plan(self, epoch: int) -> list[int]:
        return np.random.default_rng((5, epoch)).permutation(self.n_batches).tolist()

    def batch(self, description: int, epoch: int) -> torch.Tensor:
        starts = np.random.default_rng((description, epoch)).integers(0, 7, (8, 1))
        return torch.from_numpy((starts + np.arange(9)) % 7)

    def loss(self, model, batch):
        self.n_losses += 1
        if self.n_losses == self.broken_at:
            raise KeyboardInterrupt
        return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def evaluate(self, model) -> dict[str, float]:
        return {"valid_loss": self.loss(model, self.batch(1000, 0)).item()}

    def score(self, metrics) -> float:
        return -metrics["valid_loss"]


def model() -> LanguageModel:
    torch.manual_seed(2)
    backbone = BackboneConfig(d_model=16, n_layer=2, d_state=4, dropout=0.1)
    return LanguageModel(LanguageModelConfig(backbone=backbone, vocab_size=7))


def run(folder, task, config, *, resume=False, compute=CPU):
    return train_model(model(), task, config, compute, RunFolder(folder, {"a": 1}, [], resume=resume), resume=resume)


CONFIG = TrainConfig(epochs=5, lr=2e-2, save_every=2, accumulation=2)


def test_learns_and_explains_itself(tmp_path):
    metrics = run(tmp_path / "run", CountUp(n_batches=20), replace(CONFIG, accumulation=1))
    assert metrics["valid_loss"] < 0.5
    best = LanguageModel.from_pretrained(tmp_path / "run")
    assert CountUp().evaluate(best) == metrics  # what was saved is what was measured
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in log if "valid_loss" in r] == [1, 2, 3, 4, 5]
    assert all(earlier["step"] <= later["step"] for earlier, later in itertools.pairwise(log))
    assert (tmp_path / "run" / "curves.png").stat().st_size > 1000
    assert any((tmp_path / "run" / "tensorboard").iterdir())
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["settings"] == {"a": 1}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run's folder, to be read only, and what it returned."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, run(folder, CountUp(), CONFIG)


def assert_same_as(undisturbed, folder, metrics) -> None:
    """To the bit."""
    whole, expected = undisturbed
    assert metrics == expected
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert logged(folder) == logged(whole)


# In the first epoch before any checkpoint, after one, in an evaluation, and between checkpoints of a later epoch.
@pytest.mark.parametrize("broken_at", [3, 6, 7, 17])
@pytest.mark.parametrize("workers", [0, 1])
def test_resumes_to_the_same_bits(undisturbed, tmp_path, broken_at, workers):
    config = replace(CONFIG, workers=workers)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", CountUp(broken_at=broken_at), config)
    assert_same_as(undisturbed, tmp_path / "broken", run(tmp_path / "broken", CountUp(), config, resume=True))


def test_resumes_with_other_workers_to_the_same_bits(undisturbed, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", CountUp(broken_at=7), CONFIG)
    metrics = run(tmp_path / "broken", CountUp(), replace(CONFIG, workers=2), resume=True)
    assert_same_as(undisturbed, tmp_path / "broken", metrics)


def logged(folder) -> list[dict]:
    """But for how long it took."""
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


def test_the_end_of_an_epoch_is_logged_once(undisturbed, tmp_path, monkeypatch):
    """Broken off when an epoch's figures are logged and its checkpoint is not there, but one of the same step (6)."""
    save, calls = LanguageModel.save_pretrained, itertools.count(1)

    def breaks(*args):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return save(*args)

    monkeypatch.setattr(LanguageModel, "save_pretrained", breaks)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", CountUp(), CONFIG)
    monkeypatch.undo()
    assert (tmp_path / "broken" / "checkpoints" / "step-00000006").is_dir()
    assert logged(tmp_path / "broken")[-1]["step"] == 6
    assert_same_as(undisturbed, tmp_path / "broken", run(tmp_path / "broken", CountUp(), CONFIG, resume=True))


def test_auxiliary_losses_are_trained_on_and_logged_by_themselves(tmp_path):
    """A balance loss so heavy that it alone moves the routers; accumulated batches count once each."""
    torch.manual_seed(2)
    moe = MoEConfig(n_experts=4, d_expert=8, balance_weight=100.0)
    backbone = BackboneConfig(d_model=16, n_layer=4, d_state=4, pattern=("mamba", "moe"), moe=moe)
    net = LanguageModel(LanguageModelConfig(backbone=backbone, vocab_size=7))
    for block in net.backbone.layers[1::2]:
        block.mixer.router.weight.data.mul_(30)  # far from balance
    config = TrainConfig(epochs=8, lr=2e-2, accumulation=2, gradient_checkpointing=True)
    train_model(net, CountUp(n_batches=20), config, CPU, RunFolder(tmp_path / "run", {}, []), resume=False)
    log = RunFolder(tmp_path / "run", {}, [], resume=True).read_log()
    auxiliary = [record["aux_loss"] for record in log if "aux_loss" in record]
    assert auxiliary[0] > 240
    assert 200 <= auxiliary[-1] < 210  # 1 of each of two layers, times the weight, where all is balanced
    assert all(record["train_loss"] < 3 for record in log if "train_loss" in record)


def test_resuming_a_finished_run_changes_nothing(undisturbed, tmp_path):
    shutil.copytree(undisturbed[0], tmp_path / "run")
    before = (tmp_path / "run" / "log.jsonl").read_text()
    assert_same_as(undisturbed, tmp_path / "run", run(tmp_path / "run", CountUp(), CONFIG, resume=True))
    assert (tmp_path / "run" / "log.jsonl").read_text() == before


def test_accumulation_equals_one_large_batch(tmp_path):
    class Halves(CountUp):
        def plan(self, epoch):
            return [(i, half) for i in range(4) for half in (0, 1)]

        def batch(self, description, epoch):
            if description == 1000:  # the validation batch
                return super().batch(description, epoch)
            i, half = description
            return super().batch(i, epoch)[4 * half : 4 * half + 4]

    class Wholes(CountUp):
        def plan(self, epoch):
            return list(range(4))

    config = replace(CONFIG, epochs=1)
    no_dropout = replace(model().config, backbone=replace(model().config.backbone, dropout=0.0))

    def trained(folder, task, accumulation):
        torch.manual_seed(2)
        net = LanguageModel(no_dropout)
        folder = RunFolder(tmp_path / folder, {}, [])
        train_model(net, task, replace(config, accumulation=accumulation), CPU, folder, resume=False)
        return net

    for a, b in zip(
        trained("halves", Halves(), 2).parameters(), trained("wholes", Wholes(), 1).parameters(), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-5)


def test_stops_early(tmp_path):
    class GettingWorse(CountUp):
        n_evaluations = 0

        def evaluate(self, model):
            self.n_evaluations += 1
            return {"valid_loss": float(self.n_evaluations)}

    task = GettingWorse()
    assert run(tmp_path / "run", task, replace(CONFIG, patience=2)) == {"valid_loss": 1.0}
    assert task.n_evaluations == 3


def test_says_when_the_loss_is_not_finite(tmp_path):
    class Diverges(CountUp):
        def loss(self, model, batch):
            return super().loss(model, batch) * float("nan")

    with pytest.raises(InputError, match="not finite at step 1"):
        run(tmp_path / "run", Diverges(), replace(CONFIG, save_every=1))


def test_cuda_asked_for_but_absent(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    with pytest.raises(InputError, match="--device cpu"):
        run(tmp_path / "run", CountUp(), CONFIG, compute=ComputeConfig(device="cuda"))


def test_parameter_groups_split_decay():
    net = model()
    decayed, free = parameter_groups(net, 0.3)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.3, 0.0)
    names = {id(p): name for name, p in net.named_parameters()}
    decayed_names = {names[id(p)].split(".", 3)[-1] for p in decayed["params"]}
    assert {"mixer.in_proj.weight", "mixer.out_proj.weight"} <= decayed_names
    assert not any("A_log" in n or n.endswith(("bias", ".D", "norm.weight")) for n in decayed_names)
    assert len(decayed["params"]) + len(free["params"]) == len(list(net.parameters()))


def test_a_slower_part():
    """What is marked has groups of its own, decayed or not as it would be; what does not learn has none."""
    net = model()
    marked, frozen = net.backbone.layers[0].mixer, net.backbone.norm_f.weight
    for parameter in marked.parameters():
        parameter._lr_scale = 0.25
    frozen.requires_grad_(False)
    groups = parameter_groups(net, 0.3)
    slow = [group for group in groups if "lr_scale" in group]
    assert [(group["lr_scale"], group["weight_decay"]) for group in slow] == [(0.25, 0.3), (0.25, 0.0)]
    assert {id(p) for group in slow for p in group["params"]} == {id(p) for p in marked.parameters()}
    assert [learning_rate(group, 2.0, 0.5) for group in groups] == [1.0, 1.0, 0.25, 0.25]
    assert learning_rate({"lr_scale": 0.25, "max_lr": 0.1}, 2.0, 0.5) == 0.05
    assert sum(len(group["params"]) for group in groups) == len(list(net.parameters())) - 1


def test_schedule():
    assert warmup_cosine(0.0, 0.1) == 0.0
    assert warmup_cosine(0.05, 0.1) == 0.5
    assert warmup_cosine(0.1, 0.1) == 1.0
    assert warmup_cosine(0.55, 0.1) == pytest.approx(0.5)
    assert warmup_cosine(1.0, 0.1) == pytest.approx(0.0)
    assert warmup_cosine(0.0, 0.0) == 1.0
