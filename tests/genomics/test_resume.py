"""Training that is killed, interrupted or out of disk, and goes on: to the same bits as an undisturbed run."""

import pickle  # noqa: TID251 - to show that it is not read
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from polymamba.cli import main
from polymamba.core.run_folder import RunFolder
from polymamba.genomics import DNAClassifier

RESULTS = ("model.safetensors", "config.json", "metrics.json", "predictions.tsv", "thresholds.json", "splits.tsv")


@pytest.fixture(scope="module")
def flags(two_classes) -> list[str]:
    few = ["--epochs", "4", "--batch-size", "32", "--save-every", "3", "--device", "cpu"]
    return [*two_classes, *few, "--window", "28"]  # which moves at random


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory) -> Path:
    """An undisturbed run."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert main(["genomics", "train", *flags, "-o", str(output)]) == 0
    return output


def train(flags: list[str], output: Path, *more: str) -> int:
    return main(["genomics", "train", *flags, "-o", str(output), *more])


def assert_same_results(one: Path, other: Path) -> None:
    for name in RESULTS:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


# Ctrl-C


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("step", [1, 6, 8])  # 6: the last one of an epoch
def test_ctrl_c_saves_and_says_how_to_go_on(step, flags, whole, tmp_path, capsys, at_step):
    with at_step(step, interrupt):
        assert train(flags, tmp_path / "run") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1] == f"interrupted: step {step} is saved; the same command with --resume goes on"
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == [f"step-{step:08d}"]
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert train(flags, tmp_path / "run", "--resume") == 0
    assert_same_results(whole, tmp_path / "run")


def test_a_second_ctrl_c_stops_at_once(flags, whole, tmp_path, capsys, at_step):
    def twice() -> None:
        interrupt()
        interrupt()

    with at_step(5, twice):
        assert train(flags, tmp_path / "run") == 1
    assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]
    assert train(flags, tmp_path / "run", "--resume") == 0
    assert_same_results(whole, tmp_path / "run")


def wait_for_epoch(process: subprocess.Popen) -> None:
    """Until it says that the first epoch is over; the rest of its words are thrown away."""
    for line in process.stderr:
        if line.startswith("epoch   1"):
            return
    raise AssertionError("ended before the first epoch did")


@pytest.mark.slow
def test_ctrl_c_at_a_terminal(flags, tmp_path):
    """As a process of its own."""
    flags = [*flags, "--epochs", "10000", "-o", str(tmp_path / "run")]
    words = [sys.executable, "-m", "polymamba", "genomics", "train", *flags]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        wait_for_epoch(process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out == ""
    assert err.splitlines()[-1].endswith("is saved; the same command with --resume goes on")
    assert "Traceback" not in err
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 1


@pytest.mark.slow
def test_a_kill(flags, whole, tmp_path):
    words = [sys.executable, "-m", "polymamba", "genomics", "train", *flags, "-o", str(tmp_path / "run")]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        wait_for_epoch(process)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "run" / "metrics.json").exists()
    subprocess.run([*words, "--resume"], check=True, capture_output=True)
    assert_same_results(whole, tmp_path / "run")


def test_a_kill_before_the_run_began(flags, tmp_path, capsys):
    """What it leaves is a half-written manifest; the same command begins anew."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".manifest.json.writing-1234").write_text('{"sett')
    assert train(flags, tmp_path / "run", "--epochs", "1") == 0
    capsys.readouterr()


def test_a_kill_while_a_checkpoint_replaces_one_of_the_same_step(tmp_path, monkeypatch):
    run = RunFolder(tmp_path / "run", {}, [])
    run.save_checkpoint(6, lambda folder: (folder / "x").write_text("before the evaluation"))

    def killed(folder, **_):
        if any(folder.glob("*")):
            (folder / "x").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        run.save_checkpoint(6, lambda folder: (folder / "x").write_text("after it"))
    assert (run.latest_checkpoint() / "x").read_text() == "after it"


# A full disk


@pytest.mark.parametrize("limit", [64, 30_000])  # bytes a file: nothing at all can be saved; or only small files
def test_a_full_disk(limit, flags, whole, tmp_path, capsys, at_step):
    """The checkpoint before, and the best model, are whole; when there is room again --resume goes on."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    run = tmp_path / "run"
    with at_step(8, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))):
        try:
            assert train(flags, run) == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    out, err = capsys.readouterr()
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "File too large" in last
    assert last.endswith("the same command with --resume goes on from the last checkpoint")
    assert "Traceback" not in err
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000006+"]  # after the evaluation
    DNAClassifier.from_pretrained(run)  # of the first epoch
    assert train(flags, run, "--resume") == 0
    assert_same_results(whole, run)


# Checkpoints that are not to be trusted


@pytest.fixture(scope="module")
def stopped(flags, tmp_path_factory, at_step) -> Path:
    """A run that stopped at step 5, to be copied."""
    output = tmp_path_factory.mktemp("stopped") / "run"
    with at_step(5, interrupt):
        assert train(flags, output) == 1
    return output


class Malicious:
    """As a pickle it runs code: it makes a file."""

    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self):
        return open, (str(self.victim), "w")


CHECKPOINT = ("average.safetensors", "model.safetensors", "optimizer.safetensors", "state.json")


def test_what_a_checkpoint_is_made_of(stopped):
    (checkpoint,) = (stopped / "checkpoints").iterdir()
    assert sorted(p.name for p in checkpoint.iterdir()) == list(CHECKPOINT)


def assert_damaged(checkpoint: Path, code: int, capsys) -> None:
    out, err = capsys.readouterr()
    assert (code, out) == (1, "")
    line = err.splitlines()[-1]
    assert line.startswith(f"error: {checkpoint}: a damaged checkpoint")
    assert "--debug" not in line


@pytest.mark.parametrize("name", [*CHECKPOINT, "pytorch_model.bin"])
def test_a_pickle_in_a_checkpoint_is_not_run(name, flags, stopped, tmp_path, capsys):
    victim, folder = tmp_path / "victim", tmp_path / "run"
    shutil.copytree(stopped, folder)
    (checkpoint,) = (folder / "checkpoints").iterdir()
    (checkpoint / name).write_bytes(pickle.dumps(Malicious(victim)))
    if name not in CHECKPOINT:
        (checkpoint / "model.safetensors").unlink()
    assert_damaged(checkpoint, train(flags, folder, "--resume"), capsys)
    assert not victim.exists()
    pickle.loads(pickle.dumps(Malicious(victim))).close()  # else the above would show nothing
    assert victim.exists()


@pytest.mark.parametrize("name", CHECKPOINT)
@pytest.mark.parametrize("damage", ["truncated", "missing", "zeros"])
def test_a_damaged_checkpoint(name, damage, flags, stopped, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    (checkpoint,) = (folder / "checkpoints").iterdir()
    content = (checkpoint / name).read_bytes()
    if damage == "missing":
        (checkpoint / name).unlink()
    else:
        (checkpoint / name).write_bytes(content[:-50] if damage == "truncated" else bytes(len(content)))
    assert_damaged(checkpoint, train(flags, folder, "--resume"), capsys)
