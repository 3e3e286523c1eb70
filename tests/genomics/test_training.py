"""Training a classifier: which records a batch holds, augmented, cut and drawn how; and that padding is not seen."""

import json

import numpy as np
import torch

from polymamba.core import BackboneConfig, TrainConfig
from polymamba.core.hub import config_from_dict
from polymamba.genomics import Dividing, DNAClassifier, DNAClassifierConfig, Source, divide, read_source
from polymamba.genomics.alphabet import decode
from polymamba.genomics.training import TrainDNA


def random_dna(rng: np.random.Generator, length: int) -> str:
    return "".join(rng.choice(list("ACGT"), length))


def test_validation_is_never_augmented(files):
    source = Source(classes=tuple(f"{name}={path}" for name, path in files.items()))
    data = divide(read_source(source), Dividing(), 0)
    task = TrainDNA(data, TrainConfig(), 0, mask_rate=0.5, rc_augment=True, balance="none", label_smoothing=0.0)
    torch.manual_seed(0)
    config = DNAClassifierConfig(backbone=BackboneConfig(d_model=8, n_layer=1), classes=data.classes)
    model = DNAClassifier(config).eval()
    with torch.no_grad():
        assert task.evaluate(model) == task.evaluate(model)
    assert task.plan(3)[0].tolist() == task.plan(3)[0].tolist()
    a, b = task.batch(task.plan(3)[0], 3), task.batch(task.plan(3)[0], 3)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0], task.batch(task.plan(3)[0], 4)[0])  # augmented anew in the next epoch


def test_windows_grow_from_epoch_to_epoch(files):
    source = Source(classes=tuple(f"{name}={path}" for name, path in files.items()))
    data = divide(read_source(source), Dividing(), 0)
    settings = {"mask_rate": 0.0, "rc_augment": False, "label_smoothing": 0.0, "balance": "none"}
    config = TrainConfig(batch_size=50, max_tokens=100)
    task = TrainDNA(data, config, 0, first_window=6, steps_per_epoch=30, **settings)
    longest, n = task.lengths.max(), len(task.lengths)
    for epoch, wanted in enumerate((6, 12, 24, longest, longest)):
        plan = task.plan(epoch)
        times = np.bincount(np.concatenate(plan), minlength=n)
        assert times.sum() == 30 * max(1, 100 // wanted)
        assert times.max() - times.min() <= 1  # each once before any again
        whole = set()
        for description in plan:
            tokens, mask, _ = task.batch(description, epoch)
            assert mask.sum(1).tolist() == np.minimum(task.lengths[description], wanted).tolist()
            for i, row, real in zip(description, tokens.numpy(), mask.numpy(), strict=True):
                assert decode(row[real]) in decode(task.train.tokens[i])
                whole.add(decode(task.train.tokens[i]).find(decode(row[real])))
        assert (len(whole) > 5) == (wanted < longest)  # at places of its own


def test_sampling_draws_each_class_equally(files, tmp_path, fast, genomics, write_fasta):
    few = write_fasta(tmp_path / "few.fa", [(f"f{i}", random_dna(np.random.default_rng(i), 30)) for i in range(13)])
    source = Source(classes=(f"many={files['with']}", f"few={few}"))
    data = divide(read_source(source), Dividing(), 0)
    settings = {"mask_rate": 0.0, "rc_augment": False, "label_smoothing": 0.0}
    task = TrainDNA(data, TrainConfig(batch_size=7), 0, balance="sampling", **settings)
    labels, n = task.train.labels, len(task.train.labels)
    for epoch in (0, 1):
        times = np.bincount(np.concatenate(task.plan(epoch)), minlength=n)
        assert times.sum() == n
        assert abs(times[labels == 0].sum() - times[labels == 1].sum()) <= 1
        assert times[labels == 0].max() == 1  # of the many a part
        assert times[labels == 1].max() - times[labels == 1].min() <= 1  # of the few all, again and again
    flags = ["--class", f"many={files['with']}", "--class", f"few={few}", "--balance", "sampling", "--epochs", 1]
    genomics("train", *flags, "-o", tmp_path / "run", *fast[2:])
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())


def test_classifier_ignores_padding():
    torch.manual_seed(0)
    fields = {"backbone": {"d_model": 12, "n_layer": 2, "pattern": ["bimamba"]}, "classes": ["a", "b", "c"]}
    model = DNAClassifier(config_from_dict(DNAClassifierConfig, fields)).eval()
    tokens = torch.randint(7, 11, (3, 33))
    mask = torch.arange(33) < torch.tensor([33, 20, 1])[:, None]
    with torch.no_grad():
        batch = model(tokens, mask)
        for row, length in enumerate((33, 20, 1)):
            assert torch.allclose(batch[row], model(tokens[row : row + 1, :length])[0], atol=1e-5)
