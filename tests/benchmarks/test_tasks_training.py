"""The runner of the synthetic tasks: pieces of a sequence, killed runs, the bound, the report."""

import json
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks" / "tasks"
sys.path.append(str(FOLDER))

from generators import Batch, copying, induction_heads  # noqa: E402
from report import bound, report  # noqa: E402
from run import main  # noqa: E402
from training import BLOCK, Training, answered, answered_in_pieces, build  # noqa: E402


def training(mixer: str = "mamba", vocab_size: int = 28) -> Training:
    torch.manual_seed(0)
    model = build(mixer, vocab_size, d_model=32, n_layer=1, d_state=4, rope=True)
    return Training(model, "cpu", lr=3e-3, weight_decay=0.0, bf16=False, graph=True, seed=3)


@pytest.mark.parametrize("mixer", ["mamba", "s4d", "lru"])
def test_in_pieces_as_at_once(mixer):
    model = training(mixer).model
    batch = copying(3, 5, 13, torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, pieces = answered(model, batch), answered_in_pieces(model, batch, 7)
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-5)


def test_pooled_reads_the_mean_of_all_up_to_its_place():
    model = training().model
    batch = copying(3, 5, 13, torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = answered(model, batch, pooled=True)
        hidden = model.backbone(model.embedding(batch.tokens))
        for i, places in enumerate(batch.places):
            for j, place in enumerate(places):
                torch.testing.assert_close(logits[i, j], model.lm_head(hidden[i, : place + 1].mean(0)))


def test_a_killed_run_ends_with_the_same_numbers(tmp_path):
    def make(n: int, generator: torch.Generator) -> Batch:
        return induction_heads(n, 8, 6, generator)

    straight, killed, resumed = (training(vocab_size=6) for _ in range(3))
    for _ in range(2):
        straight.block(make, 2, 0.5)
    killed.block(make, 2, 0.5)
    killed.level = 1
    killed.save(tmp_path / "checkpoint.safetensors")
    resumed.load(tmp_path / "checkpoint.safetensors")
    assert (resumed.steps, resumed.level) == (BLOCK, 1)
    resumed.block(make, 2, 0.5)
    assert resumed.curve == straight.curve
    for a, b in zip(resumed.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_shares_of_right_answers():
    class Echo(torch.nn.Module):
        """A backbone for which the answer is the token at its place."""

        def forward(self, x):
            return x

    t = training()
    t.model.backbone = Echo()
    t.model.config = build("attention", 28, 32, 1, 4, rope=True).config
    t.model.embedding.weight.data = torch.eye(28)
    t.model.lm_head.weight.data = torch.eye(28)
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    places = torch.tensor([[0, 2], [1, 0]])
    answers = torch.tensor([[1, 2], [5, -100]])
    assert t.test(Batch(tokens, places, answers)) == {"accuracy": 2 / 3, "whole": 1 / 2, "sequences": 2}


def test_bound():
    # 26^n strings need n log2 26 bits to be told apart: 4 numbers of 32 bits hold 27 letters.
    n = bound({"state": 4})
    assert 26.0 ** (n - 0.3) < 2**128 < 26.0**n


def test_command_and_report(tmp_path, monkeypatch, capsys):
    # The command may lower the precision of products of its own process; all later tests of this one would have it.
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    words = "run.py copying --mixer mamba --longest 5 --batch 2 --steps 20 --tested 4 8 --d-model 16 --device cpu"
    monkeypatch.setattr(sys, "argv", [*words.split(), "--folder", str(tmp_path)])
    main()
    (result,) = tmp_path.glob("*.json")
    run = json.loads(result.read_text())
    assert run["steps"] == 20
    assert [test["x"] for test in run["tests"]] == [4, 8]
    assert result.with_suffix(".png").exists()
    main()
    assert "there already" in capsys.readouterr().out
    out = tmp_path / "docs"
    out.mkdir()
    text = report(tmp_path, out)
    assert "| mamba |" in text
    assert f"{32 * run['state']:,} bits" in text
    assert (out / "copying.png").exists()
