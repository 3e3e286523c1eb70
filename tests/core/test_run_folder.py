import json

import pytest

from polymamba.core import InputError
from polymamba.core.files import written_whole
from polymamba.core.run_folder import RunFolder


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "data.fa"
    file.write_text(">a\nACGT\n")
    return file


def test_manifest(tmp_path, data):
    run = RunFolder(tmp_path / "run", {"seed": 3}, [data])
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["settings"] == {"seed": 3}
    assert len(manifest["inputs_sha256"][str(data)]) == 64
    assert "torch" in manifest["versions"]


def test_refuses_what_is_not_its_own(tmp_path, data):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="a file"):
        RunFolder(tmp_path / "file", {}, [])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.doc").write_text("x")
    with pytest.raises(InputError, match="other files"):
        RunFolder(tmp_path / "other", {}, [])
    with pytest.raises(InputError, match="no run to resume"):
        RunFolder(tmp_path / "new", {}, [], resume=True)
    assert not (tmp_path / "new").exists()
    RunFolder(tmp_path / "run", {"lr": 1, "seed": 0}, [data])
    with pytest.raises(InputError, match="--resume"):
        RunFolder(tmp_path / "run", {"lr": 1, "seed": 0}, [data])
    with pytest.raises(InputError, match="setting lr was 1 and is now 2"):
        RunFolder(tmp_path / "run", {"lr": 2, "seed": 0}, [data], resume=True)
    RunFolder(tmp_path / "run", {"lr": 1, "seed": 0}, [data], resume=True)
    data.write_text(">a\nACGA\n")
    with pytest.raises(InputError, match=r"checksum of .*data.fa"):
        RunFolder(tmp_path / "run", {"lr": 1, "seed": 0}, [data], resume=True)


def test_resumes_by_another_way_to_the_same_result(tmp_path):
    RunFolder(tmp_path / "run", {"lr": 1, "workers": 0, "save_every": 200}, [])
    settings = {"lr": 1, "workers": 4, "save_every": 10, "fsdp": True, "stall": 60}  # two are new since it began
    RunFolder(tmp_path / "run", settings, [], resume=True)


def test_log_survives_a_cut_line_and_rewinds(tmp_path):
    run = RunFolder(tmp_path / "run", {}, [])
    for step in (1, 2, 3):
        run.append_log({"step": step})
    with open(run / "log.jsonl", "a") as file:
        file.write('{"step": 4, "los')  # killed here
    assert [r["step"] for r in run.read_log()] == [1, 2, 3]
    run.rewind_log(2)
    assert [r["step"] for r in run.read_log()] == [1, 2]


def test_a_checkpoint_that_fails_leaves_the_last_one(tmp_path):
    run = RunFolder(tmp_path / "run", {}, [])
    assert run.latest_checkpoint() is None
    run.save_checkpoint(9, lambda folder: (folder / "x").write_text("9"))

    def disk_full(folder):
        (folder / "x").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="space"):
        run.save_checkpoint(10, disk_full)
    assert (run.latest_checkpoint() / "x").read_text() == "9"
    run.save_checkpoint(11, lambda folder: (folder / "x").write_text("11"))
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step-00000011"]


def test_written_whole_or_not_at_all(tmp_path):
    target = tmp_path / "t.txt"
    target.write_text("old")

    def write(text: str, *, fail: bool) -> None:
        with written_whole(target) as beside:
            beside.write_text(text)
            if fail:
                raise RuntimeError

    with pytest.raises(RuntimeError):
        write("half", fail=True)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
    write("new", fail=False)
    assert target.read_text() == "new"
