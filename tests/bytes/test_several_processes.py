"""`bytes train` behind torchrun: the files of a run of one process, a killed process, a stopped one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

RESUMES = "the same command with --resume goes on from the last checkpoint"


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for i in range(12):
        (folder / f"{i}.txt").write_text(" ".join(f"{(i * j) % 97} apples" for j in range(60)))
    return folder


def command(texts: Path, output: Path, *more: str, n: int = 2) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)]
    flags = ["--context", "64", "--epochs", "6", "--batch-size", "8", "--save-every", "3", "--device", "cpu"]
    train = ["-m", "polymamba", "bytes", "train", str(texts), "-o", str(output), *flags, "--accumulation", "2", *more]
    return [*(launcher if n > 1 else [sys.executable]), *train]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def run(words: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(words, check=True, capture_output=True, text=True, env=environment(), timeout=300)


@pytest.fixture(scope="module")
def whole(texts, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "run"
    done = run(command(texts, output))
    assert done.stdout.count("bits_per_byte") == 3  # one table: ours, order 0, xz
    assert [line.split()[1] for line in done.stderr.splitlines() if line.startswith("epoch")] == list("123456")
    return output


def test_two_processes_leave_what_one_leaves(texts, whole, tmp_path):
    run(command(texts, tmp_path / "run", n=1))
    assert {path.name for path in whole.iterdir()} == {path.name for path in (tmp_path / "run").iterdir()}
    ours, truth = (load_file(folder / "model.safetensors") for folder in (whole, tmp_path / "run"))
    for name, tensor in truth.items():
        assert (ours[name] - tensor).abs().max() < 1e-4, name


def start(words: list[str], output: Path) -> tuple[subprocess.Popen, list[int]]:
    """A run that has left its first checkpoint, and its processes' ids by rank."""
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment())
    deadline = time.monotonic() + 120
    while not list(output.glob("checkpoints/step-*")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = {}
    for child in map(int, children):
        variables = Path(f"/proc/{child}/environ").read_text().split("\0")
        ranks |= {int(v.removeprefix("RANK=")): child for v in variables if v.startswith("RANK=")}
    return process, [ranks[rank] for rank in sorted(ranks)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process(victim, texts, whole, tmp_path):
    output = tmp_path / "run"
    process, ranks = start(command(texts, output), output)
    os.kill(ranks[victim], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode
    told = [line for line in err.splitlines() if line.startswith("error:")]
    assert told == [f"error: another process of the run has ended; {RESUMES}"]
    run(command(texts, output, "--resume"))
    for name in ("model.safetensors", "metrics.json"):
        assert (output / name).read_bytes() == (whole / name).read_bytes(), name
    assert curve(output) == curve(whole)


def curve(folder: Path) -> list[dict]:
    records = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_that_hangs_is_named(texts, tmp_path):
    output = tmp_path / "run"
    process, ranks = start(command(texts, output, "--epochs", "1000", "--stall", "10"), output)
    os.kill(ranks[1], signal.SIGSTOP)
    err = ""
    for line in process.stderr:
        err += line
        if line.startswith("error:"):
            os.kill(ranks[1], signal.SIGKILL)  # the launcher would wait half a minute for it
            break
    process.communicate(timeout=60)
    assert f"pid {ranks[1]}), last heard of in step" in err
    assert RESUMES in err


def test_what_is_wrong_for_all_is_told_once(texts, tmp_path):
    words = command(texts, tmp_path / "run", "--accumulation", "3")
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=120, check=False)
    assert done.returncode
    told = [line for line in done.stderr.splitlines() if "--accumulation 3" in line]
    assert len(told) == 1
    assert told[0].startswith("error: --accumulation 3: 2 processes share the batches of a step")
    assert not (tmp_path / "run").exists()  # where the command that is right would find a run of other settings
