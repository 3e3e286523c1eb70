"""The loss of windows that are cut over two processes: what these have of it is that of one, and so are gradients."""

import torch
import torch.distributed as dist

from polymamba.core.config import BackboneConfig, TrainConfig
from polymamba.core.parallel import context_parallel
from polymamba.genomics.alphabet import VOCAB_SIZE
from polymamba.genomics.caduceus import Caduceus
from polymamba.genomics.config import CaduceusConfig, DNALanguageModelConfig
from polymamba.genomics.language_model import DNALanguageModel
from polymamba.genomics.n_runs import find_n_runs
from polymamba.genomics.parts import Stretch
from polymamba.genomics.pretraining import TrainGenome, Windows
from polymamba.genomics.reading.genome import Genome
from polymamba.genomics.tokenizers import CHARACTERS

BATCHES = {"divides": [[0, 0, 40], [0, 40, 40]], "odd": [[0, 3, 41]], "one is short": [[0, 0, 41], [0, 50, 17]]}


def task(genome, objective):
    stretches = [Stretch(0, 0, 120, "train")]
    windows = Windows(stretches, find_n_runs(genome, stretches), 0.5)
    return TrainGenome(
        *(genome, windows, windows, TrainConfig(), 5),
        objective=objective,
        tokenizer=CHARACTERS,
        length=40,
        first_length=40,
        steps_per_epoch=None,
        mask_rate=0.3,
        lower_case_weight=0.5,
        rc_augment=False,
        valid_bases=100,
    )


def model_of(kind):
    torch.manual_seed(1)
    pattern = ("mamba",) if kind == "next" else ("bimamba",)
    backbone = BackboneConfig(d_model=8, n_layer=2, d_state=2, pattern=pattern)
    if kind == "next":
        return DNALanguageModel(DNALanguageModelConfig(backbone=backbone, vocab_size=VOCAB_SIZE))
    return Caduceus(CaduceusConfig(backbone=backbone, rcps=kind == "rcps"))


def loss_and_gradients(work, model, batch):
    loss = work.loss(model, batch)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def errors(fasta):
    """{case: largest error}."""
    found = {}
    with Genome([fasta]) as genome:
        for kind in ("next", "masked", "rcps"):
            work = task(genome, "next" if kind == "next" else "masked")
            for name, windows in BATCHES.items():
                batch = work.batch(torch.tensor(windows).numpy(), 0)
                truth = loss_and_gradients(work, model_of(kind), batch)
                with context_parallel(dist.group.WORLD):
                    own = loss_and_gradients(work, model_of(kind), batch)
                for x in own:
                    dist.all_reduce(x)
                found[kind, name] = max(float((a - b).abs().max()) for a, b in zip(own, truth, strict=True))
    return found


def test_losses_add_up(tmp_path, in_processes):
    letters = "".join("ACGTacgtNA"[i * i * 7 % 91 % 10] for i in range(120))
    (tmp_path / "x.fa").write_text(f">x\n{letters}\n")
    for found in in_processes(2, errors, str(tmp_path / "x.fa")):
        for case, error in found.items():
            assert error < 2e-6, case
