"""Training on 2 and 4 processes, by DDP and FSDP2: the numbers of one, and checkpoints that any number goes on from."""

import shutil
import subprocess
import sys
from contextlib import nullcontext
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
    RunFolder,
    Task,
    TrainConfig,
    averaging,
    processes,
    sharded,
    train,
    train_model,
)
from polymamba.core.parallel import padded_piece
from polymamba.core.processes import _Sign, stuck
from polymamba.core.train import settings_of

N_BATCHES, N_VALID = 10, 7  # of an epoch; in steps of 4 batches, the last one of 2
CONFIG = TrainConfig(epochs=2, lr=1e-2, save_every=2, accumulation=4, clip=0.3, ema=0.9)


class CountUp(Task):
    """Next-token prediction of sequences that count upwards modulo 7, in batches of unlike sizes."""

    cuts = True

    def __init__(self, broken_at: int | None = None):
        self.broken_at, self.made, self.n_losses = broken_at, [], 0

    def plan(self, epoch):
        return np.random.default_rng((5, epoch)).permutation(N_BATCHES).tolist()

    def batch(self, description, epoch):
        self.made.append((epoch, description))
        starts = np.random.default_rng((description, epoch)).integers(0, 7, (2 + description % 3, 1))
        return torch.from_numpy((starts + np.arange(9)) % 7)

    def loss(self, model, batch):
        self.n_losses += 1
        if self.n_losses == self.broken_at:
            raise KeyboardInterrupt
        logits = model(padded_piece(batch[:, :-1], 0)).flatten(0, 1)
        nats = F.cross_entropy(logits, padded_piece(batch[:, 1:], -1).flatten(), ignore_index=-1, reduction="sum")
        return nats / batch[:, 1:].numel()

    def evaluate(self, model):
        def of_batch(number):
            batch = CountUp().batch(100 + number, 0)
            return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).item()

        return {"valid_loss": float(np.mean(processes.each_once(range(N_VALID), of_batch)))}

    def score(self, metrics):
        return -metrics["valid_loss"]


def run(folder, *, pattern=("mamba",), broken_at=None, resume=False, **flags):
    """Train in `folder`, perhaps only up to a certain batch of each process. Returns the batches that this one made."""
    torch.manual_seed(2)
    moe = MoEConfig(n_experts=4, d_expert=8, balance_weight=0)  # balance is that of what a process has at a time
    backbone = BackboneConfig(d_model=16, n_layer=2, d_state=4, pattern=pattern, moe=moe)
    model = LanguageModel(LanguageModelConfig(backbone=backbone, vocab_size=7))
    task = CountUp(broken_at)
    out = RunFolder(folder, flags, [], resume=resume)
    config, cpu = replace(CONFIG, **flags), ComputeConfig(device="cpu", seed=1)
    try:
        train_model(model, task, config, cpu, out, resume=resume)
    except KeyboardInterrupt:
        assert broken_at is not None
    return task.made


def results(folder):
    """The best model's tensors, and the curve."""
    curve = RunFolder(folder, {}, [], resume=True).read_log()
    weights = LanguageModel.from_pretrained(folder).state_dict()
    return weights, [{k: v for k, v in record.items() if k != "seconds"} for record in curve]


def assert_same(folder, truth):
    weights, curve = results(folder)
    for name, tensor in truth[0].items():
        assert (weights[name] - tensor).abs().max() < 1e-5, name
    assert len(curve) == len(truth[1])
    for found, expected in zip(curve, truth[1], strict=True):
        assert found == pytest.approx(expected, abs=1e-5)


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "run"
    run(folder)
    return results(folder)


def test_two_processes_are_one_and_read_different_batches(tmp_path, truth, in_processes):
    made = in_processes(2, run, tmp_path / "run")
    assert_same(tmp_path / "run", truth)
    assert not set(made[0]) & set(made[1])
    assert len(set(made[0] + made[1])) == CONFIG.epochs * N_BATCHES


def broken(folder, **options):
    run(folder, broken_at=9, **options)  # in a step that the last checkpoint knows nothing of


def resumed(folder, **options):
    return run(folder, resume=True, **options)


def resumed_in_small_units(folder, **options):
    sharded.UNIT, sharded.KEPT = 1, 0
    resumed(folder, **options)


@pytest.mark.parametrize("fsdp", [False, True])
def test_save_on_two_resume_on_one_and_on_four(fsdp, tmp_path, truth, in_processes):
    in_processes(2, broken, tmp_path / "two", fsdp=fsdp)
    files = [path.name for path in (tmp_path / "two" / "checkpoints" / "step-00000004").glob("optimizer*")]
    assert len(files) == (2 if fsdp else 1)
    shutil.copytree(tmp_path / "two", tmp_path / "four")
    resumed(tmp_path / "two", fsdp=fsdp)
    assert_same(tmp_path / "two", truth)
    in_processes(4, resumed_in_small_units, tmp_path / "four", fsdp=fsdp)
    assert_same(tmp_path / "four", truth)


def test_sequences_in_pieces_then_experts_spread_too(tmp_path, in_processes):
    """Two pieces of each sequence, weights whole; gone on with on four processes: two groups that have other batches,
    in each of them two pieces, and half of the experts on each process; all other weights in four parts."""
    pattern = "mamba", "moe"
    run(tmp_path / "one", pattern=pattern)
    in_processes(2, broken, tmp_path / "run", pattern=pattern, context_parallel=2)
    made = in_processes(4, resumed, tmp_path / "run", pattern=pattern, context_parallel=2, expert_parallel=2)
    assert_same(tmp_path / "run", results(tmp_path / "one"))
    assert made[0] == made[1]
    assert not set(made[0]) & set(made[2])


class OnCPU(train.Division):
    """As on a GPU with cuda_graph."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.records = self.averages = True


def recorded(folder):
    """A training whose recorded backward knows of no other process; a graph's stand-in is the function itself."""
    train.Division, train.Replayed = OnCPU, lambda function, _: function
    train.own_stream = lambda _: nullcontext()
    CountUp.same_kernels = True
    averaging.BUCKET = 100  # of some 3,000
    run(folder, cuda_graph=True)


@pytest.mark.parametrize("n", [2, 4])
def test_recorded_gradients(n, tmp_path, truth, in_processes):
    """They meet after the backward where a process has two batches, or, in an epoch's last step on four, perhaps none;
    while it goes on where each has one."""
    in_processes(n, recorded, tmp_path / "run")
    assert_same(tmp_path / "run", truth)


def refusals():
    """What is said of each setting that 2 processes, or this training, cannot have."""
    said = []
    for cuts, n_experts, flags in [
        (False, 0, {"accumulation": 3}),
        (True, 0, {"accumulation": 3, "context_parallel": 2}),
        (False, 0, {"context_parallel": 2}),
        (True, 0, {"context_parallel": 4}),
        (True, 0, {"expert_parallel": 2}),
        (True, 5, {"expert_parallel": 2}),
        (True, 4, {"expert_parallel": 2}),
    ]:
        try:
            config, cpu = replace(CONFIG, **flags), ComputeConfig(device="cpu")
            settings_of(config, cpu, same_kernels=False, cuts=cuts, n_experts=n_experts)
            said.append("")
        except InputError as error:
            said.append(str(error))
    return said


def test_refusals(in_processes):
    for said in in_processes(2, refusals):
        assert said[0].startswith("--accumulation 3: 2 processes share the batches of a step; give a multiple of 2")
        assert said[1] == ""  # both have the same batches
        assert said[2].startswith("--context-parallel: this kind of training cannot cut its sequences")
        assert said[3].startswith("--context-parallel 4: 2 processes do not divide by 4")
        assert said[4] == "--expert-parallel 2: a layer has no experts; leave it out"
        assert said[5] == "--expert-parallel 2: a layer has 5 experts; give a number that divides these"
        assert said[6] == ""


def sign(number=2, moves=5, step=3, waits=0, name="host, pid 1"):
    return _Sign(number, moves, step, waits, name)


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (
            [sign(3), sign(2, name="host, pid 7"), sign(3)],
            "process 1 (host, pid 7), last heard of in step 3, is silent",
        ),
        ([sign(3), sign(3, moves=6), sign(3)], None),
        ([sign(3, step=4), sign(3, step=4), sign(3)], "process 2 (host, pid 1), in step 3, holds the others up"),
        ([sign(3, waits=1), sign(3), sign(3, waits=1)], "process 1 (host, pid 1), in step 3, holds the others up"),
        ([sign(3), sign(3), sign(3)], "no process has moved on from step 3"),
        ([sign(3, waits=1), sign(3, waits=1), sign(3, waits=1)], "no process has moved on from step 3"),
    ],
)
def test_who_is_stuck(after, said):
    assert stuck([sign()] * len(after), after) == said


GIVE_UP = """
import threading, time
from polymamba.core import processes

calls = []


class Store:
    def add(self, key, n):
        calls.append(key)
        place = len(calls)
        time.sleep(0.3 if place == 1 else 0)
        return place


processes._store = Store
threading.Thread(target=processes._give_up, args=("lost",)).start()
while not calls:
    time.sleep(0.001)
processes._give_up("lost, too")
"""


def test_who_gives_up_in_two_threads_says_so():
    """The thread that meets the lost connection, and the one that gets the launcher's signal meanwhile."""
    done = subprocess.run([sys.executable, "-c", GIVE_UP], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == "error: lost; the same command with --resume goes on from the last checkpoint\n"


def test_each_once_alone():
    assert processes.each_once(range(3), lambda i: 2 * i) == [0, 2, 4]
    assert processes.from_first(lambda: 7) == 7
