"""Of several processes the first alone writes to a run folder, in every command that trains."""

import os
import sys
from importlib import import_module

import numpy as np
import pytest
import soundfile
from PIL import Image

from polymamba import cli

WORDS = {
    "bytes.verbs.train": "bytes train {0}/texts --context 64",
    "audio.verbs.train": "audio train {0}/sounds --context 100",
    "vision.verbs.train": "vision train {0}/pictures --model test_vmamba --size 16",
    "genomics.verbs.train": "genomics train --class a={0}/a.fa --class b={0}/b.fa",
    "genomics.verbs.bases": "genomics train-bases {0}/genome.fa --labels {0}/sites.bed {1}",
    "genomics.verbs.pretrain": "genomics pretrain {0}/genome.fa {1} --length 32 --tokenizer bpe --vocab-size 80",
}
CHROMOSOMES = "--valid-chromosomes 2 --test-chromosomes 3"


@pytest.fixture
def inputs(tmp_path):
    folder, rng = tmp_path / "inputs", np.random.default_rng(0)
    for name in ("texts", "sounds", "pictures/one", "pictures/two"):
        (folder / name).mkdir(parents=True)
    for i in range(12):
        (folder / "texts" / f"{i}.txt").write_text(" ".join(map(str, rng.integers(0, 99, 200))))
        soundfile.write(folder / "sounds" / f"{i}.wav", rng.uniform(-0.5, 0.5, 400), 2000)
        kind = ("one", "two")[i % 2]
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(folder / "pictures" / kind / f"{i}.png")
    dna = ["".join(rng.choice(list("ACGT"), 1200)) for _ in range(3)]
    (folder / "genome.fa").write_text("".join(f">chr{i}\n{text}\n" for i, text in enumerate(dna, start=1)))
    (folder / "sites.bed").write_text("".join(f"chr{i}\t{at}\t{at + 9}\tsite\n" for i in (1, 2, 3) for at in (40, 400)))
    for name, text in zip("ab", dna, strict=False):
        (folder / f"{name}.fa").write_text("".join(f">{name}{i}\n{text[i : i + 40]}\n" for i in range(0, 1200, 40)))
    return folder


def begun(folder):
    """Begin every training; {command: (whether it came to the training, what this process wrote before)}."""
    found, runs = {}, str(folder / "runs")
    written = []

    def watch(event, arguments):
        if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            written.append(str(arguments[0]))
        elif event in ("os.rename", "os.mkdir", "os.remove"):
            written.append(os.fsdecode(arguments[0]))

    sys.addaudithook(watch)
    cli.OTHERS_WAIT = 0
    for module, words in WORDS.items():
        came = []

        def stop(*_, came=came, **__):
            came.append(True)
            raise KeyboardInterrupt

        import_module(f"polymamba.{module}").train_model = stop
        written.clear()
        words = f"{words.format(folder / 'inputs', CHROMOSOMES)} --accumulation 2 --device cpu -o {runs}/{module}"
        cli.main(words.split())
        found[module] = bool(came), [path for path in written if path.startswith(runs)]
    return found


def test_the_first_process_alone_writes(inputs, in_processes):
    first, second = in_processes(2, begun, inputs.parent)
    for module in WORDS:
        assert first[module][0], module
        assert second[module][0], module
        assert any("splits." in path for path in first[module][1]), module
        assert second[module][1] == [], module
