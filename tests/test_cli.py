"""The command line's frame: help without torch, exit codes, other packages' domains, errors, doctor, convert."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from polymamba import cli
from polymamba.core import InputError, LanguageModel

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("words", [["--help"], ["genomics", "--help"], ["genomics", "train", "--help"], ["--version"]])
def test_help_does_not_load_torch(words):
    code = f"import sys; from polymamba.cli import main; code = main({words}); sys.exit(code or 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout) > 4


def test_help_is_not_broken_where_its_source_is(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")
    assert cli.main(["bytes", "train", "--help"]) == 0
    assert "moe-mamba-25m has 542 million" in capsys.readouterr().out
    assert cli._paragraphs("one\n    two,\n    `three`\n\n    four ") == "one two, `three`\n\nfour"


def test_importing_models_and_verbs_does_not_load_the_compiler():
    code = "import sys, polymamba.genomics.verbs.variants, polymamba.bytes; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_usage_errors_exit_with_2(capsys):
    for words in ([], ["cook"], ["genomics"], ["genomics", "cook"], ["doctor", "--cook"], ["convert", "mamba-ssm"]):
        assert cli.main(words) == 2, words
    assert "no command 'cook'; there are genomics, " in capsys.readouterr().err


def test_a_package_adds_its_domain(tmp_path, monkeypatch, capsys):
    """Through the entry-point group, as an installed distribution does."""
    shutil.copy(ROOT / "examples" / "new_modality.py", tmp_path / "digits_package.py")
    metadata = tmp_path / "digits_package-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: digits-package\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[polymamba.commands]\ndigits = digits_package:COMMANDS\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert cli.main(["digits", "--help"]) == 0
    assert "Train a classifier of handwritten digits." in capsys.readouterr().out
    assert cli.main(["digits", "train", "--output", str(tmp_path / "run"), "--epochs", "1"]) == 0
    assert (tmp_path / "run" / "model.safetensors").exists()


@dataclass
class Boom:
    """Flags of a verb that fails."""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (InputError("x.fa, record r: bad"), "error: x.fa, record r: bad"),
        (FileNotFoundError(2, "No such file or directory", "y"), "error: [Errno 2] No such file or directory: 'y'"),
        (ZeroDivisionError("oops\nagain"), "error: ZeroDivisionError: oops again (--debug shows where)"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_one_line_a_failure(error, line, monkeypatch, capsys):
    def fail(_):
        raise error

    monkeypatch.setitem(cli.TOP_LEVEL, "boom", (Boom, "nowhere:run"))
    monkeypatch.setattr(cli, "_load", lambda _: fail)
    assert cli.main(["boom"]) == 1
    assert capsys.readouterr().err == line + "\n"


READERLESS = """
import os, sys
reader, writer = os.pipe()
os.dup2(writer, 1)
os.close(reader)
from polymamba import cli
def talk(_):
    {talk}
cli.TOP_LEVEL["talk"] = (cli.Doctor, "nowhere:run")
load, cli._load = cli._load, lambda target: talk if target == "nowhere:run" else load(target)
sys.exit(cli.main({words}))
"""


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("words", "talk"),
    [
        (["talk"], "print('a line, written when all is done')"),
        (["talk"], "sys.stdout.buffer.write(b'written at once'); sys.stdout.buffer.flush()"),
        (["talk"], "[print('more than any buffer holds' * 1000) for _ in range(1000)]"),
        (["--help"], "pass"),
    ],
)
def test_ends_quietly_when_nobody_reads(words, talk, unbuffered):
    """As a Unix tool does in `polymamba ... | head -1`."""
    code = READERLESS.format(words=words, talk=talk)
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stderr) == (141, "")


def test_another_broken_pipe_is_told(monkeypatch, capfd):
    def fail(_):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setitem(cli.TOP_LEVEL, "boom", (Boom, "nowhere:run"))
    monkeypatch.setattr(cli, "_load", lambda _: fail)
    assert cli.main(["boom"]) == 1
    assert capfd.readouterr().err == "error: [Errno 32] Broken pipe\n"


def test_doctor(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"torch         {torch.__version__.split('+')[0]}" in out
    assert "selective_scan on cpu" in out
    assert "largest error" in out
    assert ("install numba" in out) == (find_spec("numba") is None)


def test_convert(tmp_path, capsys):
    checkpoint = tmp_path / "official"
    checkpoint.mkdir()
    golden = ROOT / "tests" / "golden" / "mamba1_lm"
    shutil.copy(golden / "config.json", checkpoint)
    assert cli.main(["convert", "mamba-ssm", str(checkpoint), str(tmp_path / "out")]) == 1
    assert "no model.safetensors" in capsys.readouterr().err
    shutil.copy(golden / "weights.safetensors", checkpoint / "model.safetensors")
    assert cli.main(["convert", "mamba-ssm", str(checkpoint), str(tmp_path / "out")]) == 0
    assert LanguageModel.from_pretrained(tmp_path / "out").config.vocab_size == 56
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model"] == "LanguageModel"
    assert cli.main(["convert", "mamba-ssm", str(checkpoint), str(tmp_path / "out")]) == 1
    assert "not an empty folder" in capsys.readouterr().err
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(
        b"\x80\x02cos\nsystem\n(S'true'\ntR."
    )  # a pickle that runs a command
    assert cli.main(["convert", "mamba-ssm", str(checkpoint), str(tmp_path / "out2")]) == 1
    assert "not a plain state dict" in capsys.readouterr().err
