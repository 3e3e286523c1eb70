"""For the tests of the command line: two classes of DNA, a run trained on them, and the check of one clear error."""

import csv
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from polymamba.cli import main


@pytest.fixture(scope="session")
def genomics():
    """Run `polymamba genomics ...`, which must succeed."""

    def run_main(*words: object) -> None:
        assert main(["genomics", *map(str, words)]) == 0

    return run_main


@pytest.fixture(scope="session")
def write_fasta():
    def write(path: Path, records: list[tuple[str, str]]) -> Path:
        path.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in records))
        return path

    return write


@pytest.fixture(scope="session")
def read_tsv():
    def read(path: Path) -> list[list[str]]:
        with path.open(newline="") as file:
            return list(csv.reader(file, delimiter="\t"))

    return read


def random_records(rng: np.random.Generator, prefix: str, motif: str, n: int) -> str:
    """FASTA of n random sequences of 30 to 50 bases, of which each holds `motif`."""

    def one() -> str:
        left, right = ("".join(rng.choice(list("ACGT"), rng.integers(10, 20))) for _ in range(2))
        return left + motif + right

    return "".join(f">{prefix}{i}\n{one()}\n" for i in range(n))


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> dict[str, Path]:
    """Class -> its FASTA file."""
    folder, rng = tmp_path_factory.mktemp("fasta"), np.random.default_rng(0)
    motifs = {"with": ("w", "GGGTACCCGG"), "without": ("o", "ATATATTTAA")}
    for name, (prefix, motif) in motifs.items():
        (folder / f"{name}.fa").write_text(random_records(rng, prefix, motif, 60))
    return {name: folder / f"{name}.fa" for name in motifs}


@pytest.fixture(scope="session")
def two_classes(files) -> list[str]:
    """The flags that name the files."""
    return [word for name, path in files.items() for word in ("--class", f"{name}={path}")]


@pytest.fixture(scope="session")
def fast() -> list[str]:
    """Flags of a training that takes a second."""
    return ["--epochs", "3", "--batch-size", "16", "--device", "cpu", "--lr", "5e-3"]


@pytest.fixture(scope="session")
def run(two_classes, fast, tmp_path_factory) -> Path:
    """A run folder, to be read only."""
    output = tmp_path_factory.mktemp("runs") / "run"
    assert main(["genomics", "train", *two_classes, "-o", str(output), *fast]) == 0
    return output


@pytest.fixture(scope="session")
def at_step():
    """`with at_step(number, act):` in it act() is called at the beginning of the step of this number, from 1 on."""
    from polymamba.core.train import _Trainer

    @contextmanager
    def within(number: int, act: Callable[[], object]) -> Iterator[None]:
        step, count = _Trainer.step, [0]

        def counted(self, *args):
            count[0] += 1
            if count[0] == number:
                act()
            return step(self, *args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_Trainer, "step", counted)
            yield

    return within


def contents(folder: Path) -> dict[Path, bytes | None]:
    """Path -> bytes of everything below `folder`; None for folders."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def error(capsys, tmp_path):
    """Run `polymamba genomics ...`; return its one line of error.

    Checked are the exit code, silence on stdout, and that nothing below tmp_path was made, changed or removed.
    """

    def run_main(*words: object, code: int = 1) -> str:
        before = contents(tmp_path)
        capsys.readouterr()
        assert main(["genomics", *map(str, words)]) == code
        out, err = capsys.readouterr()
        assert out == ""
        (line,) = err.splitlines()
        assert line.startswith("error: ")
        assert "--debug" not in line, "an error that nobody thought of"
        assert contents(tmp_path) == before
        return line

    return run_main
