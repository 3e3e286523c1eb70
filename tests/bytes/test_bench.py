"""`bytes bench`: what is counted and reported; how long it takes is not tested."""

import copy
import json

import pytest
import torch

from polymamba.bytes import ByteLM, bench
from polymamba.bytes.verbs.bench import COLUMNS
from polymamba.cli import main
from polymamba.core import BackboneConfig, LanguageModelConfig, MoEConfig


@pytest.fixture(autouse=True)
def small_copy(monkeypatch):
    monkeypatch.setitem(bench.COPIED, "cpu", 1000)


def test_what_a_decoding_step_moves(model):
    """Of the model of conftest: d_model 16, inner width 32, 2 layers, 4 states, rank 1, 320 ids."""
    block = 16 * 64 + 32 * 4 + 32 + 32 * (1 + 2 * 4) + 32 + 32 + 32 * 4 + 32 + 32 * 16 + 16
    weights = 2 * block + 16 + 320 * 16
    state = 2 * 4 * (32 * 3 + 32 * 4)  # float32: the convolution's last 3 inputs, and 4 states, of each channel
    assert bench.bytes_per_step(model, 1, bf16=False) == 4 * weights + 2 * state
    assert bench.bytes_per_step(model, 7, bf16=True) == 2 * weights + 2 * 7 * state


def test_limit_of_a_mixture_of_experts():
    moe = MoEConfig(n_experts=5, d_expert=24)
    backbone = BackboneConfig(d_model=16, n_layer=1, pattern=("moe",), moe=moe)
    model = ByteLM(LanguageModelConfig(backbone=backbone, vocab_size=320, tie_embeddings=False))
    rest, expert = 5 * 16 + 16 + 16 + 320 * 16, 2 * 16 * 24  # router, two norms, head
    read = [bench.bytes_per_step(model, batch, bf16=False) / 4 - rest for batch in (1, 3, 64)]
    assert read == [expert, 3 * expert, 5 * expert]


def test_training_leaves_the_model_as_it_was(model):
    before = copy.deepcopy(model.state_dict())
    row = bench.measure_training(model, batch=2, context=9, repeats=2)
    assert (row.work, row.batch, row.length) == ("training", 2, 9)
    assert row.bytes_per_second == 18 / row.seconds
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.training
    assert all(p.grad is None for p in model.parameters())


def test_decoding_is_generations(model, monkeypatch):
    """Each step of it is one of `core.generation.generate`, on as many rows as the line says."""
    rows = []
    step = type(model).step

    def counted(self, tokens, *args):
        rows.append(len(tokens))
        return step(self, tokens, *args)

    monkeypatch.setattr(type(model), "step", counted)
    row = bench.measure_decode(model, 3, repeats=2, moved=10**6, bandwidth=1e9)
    assert set(rows) == {3}
    assert len(rows) == 3 * bench.WINDOW - 1  # the first byte is drawn from the prompt's logits
    assert row.share_of_limit == pytest.approx(1e-3 / row.seconds)
    assert row.bytes_per_second == pytest.approx(3 / row.seconds)


def test_what_does_not_fit_is_said_and_the_rest_measured(model, monkeypatch):
    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench, "next_byte_loss", too_large)
    settings = {"training": (2, 9), "prompt": 20, "batches": (1,), "bf16": False, "repeats": 1}
    _, training, prefill, decode = bench.measure(model, **settings)
    assert (training.seconds, training.bytes_per_second) == (None, None)
    assert prefill.seconds > 0
    assert decode.share_of_limit > 0


def run(*words: object) -> int:
    few = ("--context", 9, "--batch-size", 2, "--prompt-bytes", 20, "--repeats", 1, "--device", "cpu")
    return main(["bytes", "bench", *map(str, (*words, *few))])


def test_the_table(model, tmp_path, capsys):
    model.save_pretrained(tmp_path / "run")
    assert run(tmp_path / "run", "--decode-batches", 1, 3, "-o", tmp_path / "b.json") == 0
    out = capsys.readouterr().out.splitlines()
    saved = json.loads((tmp_path / "b.json").read_text())
    assert saved["parameters"] == sum(p.numel() for p in model.parameters())
    assert [(row["work"], row["batch"], row["length"]) for row in saved["rows"]] == [
        *(("training", 2, 9), ("prefill", 1, 20), ("decode", 1, 1), ("decode", 3, 1)),
    ]
    assert all(row["seconds"] > 0 for row in saved["rows"])
    head = next(i for i, line in enumerate(out) if line.startswith("work "))
    assert [line.split()[0] for line in out[head + 1 :]] == ["training", "prefill", "decode", "decode"]


def test_of_a_preset(tmp_path, capsys):
    assert run("tiny", "--decode-batches", 2, "-o", tmp_path / "b.md") == 0
    assert "model: tiny" in capsys.readouterr().out
    rows = [line.split(" | ") for line in (tmp_path / "b.md").read_text().splitlines() if line.startswith("|")]
    assert tuple(cell.strip("| ") for cell in rows[0]) == COLUMNS
    assert [row[0].strip("| ") for row in rows[2:]] == ["training", "prefill", "decode"]


def test_bad_input(tmp_path, capsys):
    assert run("huge") == 1
    assert "huge: neither a run folder nor a preset (tiny, small" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert run("tiny", "-o", tmp_path / "file" / "b.md") == 1
    assert "is no folder" in capsys.readouterr().err
    assert run("tiny", "-o", tmp_path / "b.txt") == 2
    assert run("tiny", "--decode-batches", 0) == 2
    assert main(["bytes", "bench", "tiny", "--repeats", "0"]) == 2
    capsys.readouterr()
