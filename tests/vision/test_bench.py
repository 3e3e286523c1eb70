"""`vision bench`: what is counted and reported; how long it takes is not tested."""

import copy
import json

import pytest
import torch
from torch import nn

from polymamba.cli import main
from polymamba.core.speed import training_step
from polymamba.vision import VMamba, VMambaConfig, bench
from polymamba.vision.verbs.bench import COLUMNS


@pytest.fixture(autouse=True)
def small_matrices(monkeypatch):
    monkeypatch.setitem(bench.MULTIPLIED, "cpu", 8)


@pytest.fixture
def model() -> VMamba:
    return VMamba(VMambaConfig(depths=(1, 1), embed_dim=8, num_classes=3))


class Linear(nn.Sequential):
    """(B, 2, 3, 5) -> 4 logits by 30 x 7 and 7 x 4 weights."""

    num_classes = 4

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(30, 7), nn.ReLU(), nn.Linear(7, 4))


def test_the_share_of_the_limit():
    lines = bench.measure(Linear(), "l", (6, 2, 3, 5), bf16=False, compiled=False, repeats=1, rate=1e6)
    training, forward = lines
    n_forward = 2 * 6 * (30 * 7 + 7 * 4)
    n_backward = 2 * 6 * (30 * 7 + 2 * 7 * 4)  # the first layer's input needs no gradient
    assert forward.share_of_limit == pytest.approx(n_forward / 1e6 / forward.seconds)
    assert training.share_of_limit == pytest.approx((n_forward + n_backward) / 1e6 / training.seconds)
    assert forward.images_per_second == 6 / forward.seconds
    assert [(line.work, line.run, line.batch, line.pixels) for line in (training, forward)] == [
        ("training", "eager", 6, (3, 5)),
        ("forward", "eager", 6, (3, 5)),
    ]


def test_training_is_whole_and_leaves_the_weights(model):
    before = copy.deepcopy(model.state_dict())
    seen = []
    model.train()
    backward = bench.backward_step(model, torch.randn(2, 3, 16, 16), torch.tensor([0, 2]), bf16=False)
    step = training_step(model, backward)
    handles = [p.register_post_accumulate_grad_hook(lambda p: seen.append(p)) for p in model.parameters()]
    step()
    assert len(seen) == len(handles)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_precisions(model):
    """bf16: the weights' own in the forward, autocast in training."""
    dtypes = []
    model.register_forward_hook(lambda m, x, y: dtypes.append((m.training, x[0].dtype, m.head.fc.weight.dtype)))
    for _ in bench.measure(model, "m", (2, 3, 16, 16), bf16=True, compiled=False, repeats=1, rate=1.0):
        pass
    assert set(dtypes) == {(True, torch.float32, torch.float32), (False, torch.bfloat16, torch.bfloat16)}


def test_what_does_not_fit_is_said_and_the_rest_measured(model, monkeypatch):
    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench, "training_step", too_large)
    options = {"bf16": False, "compiled": False, "repeats": 1, "rate": 1e9}
    training, forward = bench.measure(model, "m", (2, 3, 16, 16), **options)
    assert (training.seconds, training.images_per_second, training.share_of_limit) == (None, None, None)
    assert forward.share_of_limit > 0


def test_compiled_lines_run_what_was_compiled(model, monkeypatch):
    called = []

    def compiled(model):
        def call(x):
            called.append(len(x))
            return model(x)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    options = {"bf16": False, "compiled": True, "repeats": 1, "rate": 1e9}
    lines = list(bench.measure(model, "m", (2, 3, 16, 16), **options))
    assert [(line.work, line.run) for line in lines] == [
        *(("training", "eager"), ("training", "compiled"), ("forward", "eager"), ("forward", "compiled")),
    ]
    assert called == [2] * 6  # of each work two to warm up and one that counts


def run(*words: object) -> int:
    return main(["vision", "bench", *map(str, words), "--batch-size", "2", "--repeats", "1", "--device", "cpu"])


def test_the_table(model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "run")
    assert run(tmp_path / "run", "test_vim", "vit_tiny_patch16_224", "--size", 32, "-o", tmp_path / "b.json") == 0
    out = capsys.readouterr().out.splitlines()
    saved = json.loads((tmp_path / "b.json").read_text())
    assert saved["images in a batch"] == 2
    rows = saved["rows"]
    names = [str(tmp_path / "run"), "test_vim", "vit_tiny_patch16_224"]
    assert [(row["model"], row["work"]) for row in rows] == [(n, w) for n in names for w in ("training", "forward")]
    assert all(row["pixels"] == [32, 32] for row in rows)
    assert [row["ratio"] for row in rows[:2]] == [1, 1]
    assert rows[3]["ratio"] == pytest.approx(rows[1]["seconds"] / rows[3]["seconds"])
    head = next(i for i, line in enumerate(out) if line.startswith("model "))
    assert [line.split()[0] for line in out[head + 1 :]] == [name for name in names for _ in range(2)]


def test_sizes_that_models_were_made_for(model, tmp_path):
    model.pretrained_cfg = {"input_size": (3, 20, 12)}
    model.save_pretrained(tmp_path / "run")
    assert run(tmp_path / "run", "test_vim", "-o", tmp_path / "b.md") == 0
    rows = [line.split(" | ") for line in (tmp_path / "b.md").read_text().splitlines() if line.startswith("|")]
    assert tuple(cell.strip("| ") for cell in rows[0]) == COLUMNS
    assert [row[3] for row in rows[2:]] == ["20x12", "20x12", "64x64", "64x64"]


def test_bad_input(tmp_path, capsys):
    assert run("huge") == 1
    assert "huge: neither a run folder nor a model of timm's" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert run("test_vim", "-o", tmp_path / "file" / "b.md") == 1
    assert "is no folder" in capsys.readouterr().err
    assert run("test_vim", "-o", tmp_path / "b.txt") == 2
    assert main(["vision", "bench", "test_vim", "--repeats", "0"]) == 2
    assert main(["vision", "bench"]) == 2
    capsys.readouterr()
