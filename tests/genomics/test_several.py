"""Several files at once: what one after another gives, errors and interruptions included."""

import gzip
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pysam
import pytest

from polymamba.core.errors import InputError
from polymamba.genomics import Source, read_source
from polymamba.genomics.reading.several import read_each


def fasta(path: Path, names: list[str], rng: np.random.Generator) -> Path:
    text = "".join(f">{name}\n{''.join(rng.choice(list('ACGTN'), rng.integers(1, 90)))}\n" for name in names).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.fixture
def paths(tmp_path) -> list[Path]:
    """Files of unlike size, so that threads end in another order than they began."""
    rng = np.random.default_rng(0)
    sizes = [300, 1, 40, 7, 120, 2, 60]
    endings = ["fa", "fa.gz"]
    return [
        fasta(tmp_path / f"{i}.{endings[i % 2]}", [f"r{i}_{j}" for j in range(n)], rng) for i, n in enumerate(sizes)
    ]


def name_and_tokens(record):
    return record.name, record.tokens.tolist()


@pytest.mark.parametrize("n_threads", [2, 3, 50])
def test_threads_are_of_no_account(n_threads, paths):
    verbosity = pysam.get_verbosity()
    expected = list(read_each(paths, name_and_tokens, n_threads=1))
    assert list(read_each(paths, name_and_tokens, n_threads=n_threads)) == expected
    assert [len(records) for records in expected] == [300, 1, 40, 7, 120, 2, 60]
    assert pysam.get_verbosity() == verbosity


def test_of_several_errors_the_first_files(paths):
    paths[1].write_text(">a\nACGT\n" * 2)
    paths[2].write_text("no FASTA")
    paths[5].unlink()
    for n_threads in (1, 4):
        with pytest.raises(InputError, match="the name stands twice") as error:
            list(read_each([path for path in paths if path.exists()], name_and_tokens, n_threads=n_threads))
        assert str(paths[1]) in str(error.value)


def test_a_file_that_is_gone(paths):
    paths[3].unlink()
    with pytest.raises(InputError, match=r"3.fa.gz: no such file"):
        list(read_each(paths, name_and_tokens, n_threads=4))


def test_pipes_are_read_one_after_another(tmp_path, paths):
    """Whoever fills one may fill the other only when the first is empty."""
    pipes = [tmp_path / f"pipe{i}" for i in range(2)]
    for pipe in pipes:
        os.mkfifo(pipe)

    def fill():
        for pipe, path in zip(pipes, (paths[0], paths[4]), strict=True):
            pipe.write_bytes(path.read_bytes())

    writer = threading.Thread(target=fill)
    writer.start()
    found = list(read_each(pipes, name_and_tokens, n_threads=2))
    writer.join()
    assert found == list(read_each([paths[0], paths[4]], name_and_tokens, n_threads=1))


@pytest.mark.parametrize("how", ["error", "interrupt", "enough"])
def test_threads_end_when_no_more_is_wanted(how, paths):
    """At their next record: the slow reader of the second file is never through."""
    before = set(threading.enumerate())
    reached, given_up = threading.Event(), threading.Event()
    kept = []

    def keep(record):
        kept.append(record.name)
        if record.name.startswith("r0_") and how == "error":
            reached.wait()
            raise InputError("first")
        if record.name.startswith("r4_"):
            reached.set()
            given_up.wait(0.2)  # nobody sets it
        elif record.name.startswith("r0_") and how == "interrupt":
            reached.wait()
            os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C does: to the process, not to this thread
            given_up.wait(0.2)
        return record.name

    pair = [paths[0], paths[4]]
    if how == "error":
        with pytest.raises(InputError, match="first"):
            list(read_each(pair, keep, n_threads=2))
    elif how == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            list(read_each(pair, keep, n_threads=2))
    else:
        read = read_each(pair, keep, n_threads=2)
        assert len(next(read)) == 300
        read.close()
    for thread in set(threading.enumerate()) - before:  # the pool knows none that was about to start when Ctrl-C came
        thread.join(10)
        assert not thread.is_alive()
    assert len([name for name in kept if name.startswith("r4_")]) < 120


@pytest.mark.parametrize("way", ["classes", "pattern", "table"])
def test_every_way_to_label_keeps_the_order(way, paths, tmp_path, monkeypatch):
    words = tuple(map(str, paths))
    table = tmp_path / "labels.tsv"
    names = [name for records in read_each(paths, lambda record: record.name, n_threads=1) for name in records]
    table.write_text("id\tlabel\n" + "".join(f"{name}\t{name[1]}\n" for name in names))
    source = {
        "classes": Source(classes=tuple(f"{i}={word}" for i, word in enumerate(words))),
        "pattern": Source(fasta=words, label_pattern=r"r(\d)"),
        "table": Source(fasta=words, labels=table),
    }[way]
    found = []
    for count in (1, 4):
        monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
        found.append(read_source(source))
    assert found[0].names == found[1].names == names
    assert found[0].digest() == found[1].digest()
    assert found[0].sources == found[1].sources == [str(paths[int(name[1])]) for name in names]
    assert found[0].label_texts() == [name[1] for name in names]
