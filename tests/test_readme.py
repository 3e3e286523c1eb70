"""What the README and the examples show, run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_python(code, monkeypatch):
    monkeypatch.chdir(ROOT)
    exec(compile(code, "README.md", "exec"), {})


def test_every_command_parses():
    """Each polymamba line of the README is a known verb with known flags."""
    from polymamba.cli import DOMAINS, TOP_LEVEL, _load

    lines = re.findall(r"polymamba ((?:genomics|bytes|audio|vision|convert|doctor)[^\n`#&]*)", README)
    assert len(lines) >= 6
    import tyro

    for line in lines:
        name, *words = line.split()
        if name in DOMAINS:
            verb, *words = words
            flags = _load(DOMAINS[name])[verb][0]
        else:
            flags = TOP_LEVEL[name][0]
        tyro.cli(flags, args=words)


def test_new_modality(tmp_path):
    words = [sys.executable, str(ROOT / "examples" / "new_modality.py"), "digits", "train"]
    result = subprocess.run(
        [*words, "--output", str(tmp_path / "run"), "--epochs", "6"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert float(re.search(r"0\.\d+", result.stdout)[0]) > 0.85
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"] == "DigitClassifier"
    lines = (ROOT / "examples" / "new_modality.py").read_text().splitlines()
    assert len(lines) < 60


def test_long_sequence(tmp_path):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    environment = os.environ | {"OUTPUT": str(tmp_path / "long"), "OMP_NUM_THREADS": "1"}
    script = str(ROOT / "examples" / "long_sequence.py")
    result = subprocess.run([*words, script, "512"], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    losses = [float(loss) for loss in re.findall(r"loss (\d\.\d+)", result.stdout)]
    assert losses[-1] < 0.5 < losses[0]
    assert json.loads((tmp_path / "long" / "config.json").read_text())["model"] == "LanguageModel"


def test_names_every_folder():
    for folder in ("facade", "kernels", "core", "genomics", "bytes", "audio", "vision", "tests", "benchmarks", "docs"):
        assert re.search(rf"^{folder}/", README, re.MULTILINE), folder


def test_links_lead_somewhere():
    """Of all pages: a link within the tree names a file that is there."""
    pages = [page for pattern in ("*.md", "docs/*.md", "benchmarks/**/*.md") for page in ROOT.glob(pattern)]
    broken = [
        f"{page.relative_to(ROOT)}: {link}"
        for page in pages
        for link in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8"))
        if "://" not in link and not (page.parent / link).exists()
    ]
    assert len(pages) > 10
    assert not broken
