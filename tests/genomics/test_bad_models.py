"""What the command line makes of models that are none or do not fit: one clear line, exit code 1, no file touched."""

import json
import pickle  # noqa: TID251 - to show that it is not read
import shutil

from polymamba.cli import main


def test_folders_that_are_no_model(error, run, files, two_classes, tmp_path):
    empty, foreign = tmp_path / "empty", tmp_path / "foreign"
    empty.mkdir()
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "bert"}')
    copies = {
        "half.safetensors": lambda weights: weights.write_bytes(weights.read_bytes()[:-100]),
        "zeros.safetensors": lambda weights: weights.write_bytes(bytes(weights.stat().st_size)),
        "none.safetensors": lambda weights: weights.unlink(),
    }
    expected = {
        empty: "no config.json",
        foreign: "holds no polymamba model",
        tmp_path / "nowhere": "no such run folder",
    }
    for name, damage in copies.items():
        shutil.copytree(run, tmp_path / name)
        damage(tmp_path / name / "model.safetensors")
        expected[tmp_path / name] = "model.safetensors"
    shutil.copytree(run, tmp_path / "config")
    (tmp_path / "config" / "config.json").write_text("{")
    expected[tmp_path / "config"] = "config.json: not JSON"
    for folder, words in expected.items():
        for verb in (
            ["predict", folder, files["with"]],
            ["embed", folder, files["with"], "-o", tmp_path / "e.npy"],
            ["eval", folder, *two_classes, "-o", tmp_path / "output"],
        ):
            line = error(*verb)
            assert str(folder) in line
            assert words in line


class Malicious:
    """As a pickle it runs code: it makes a file."""

    def __init__(self, victim):
        self.victim = victim

    def __reduce__(self):
        return open, (str(self.victim), "w")


def test_a_pickle_in_place_of_weights_is_not_run(error, run, files, tmp_path):
    folder, victim = tmp_path / "run", tmp_path / "victim"
    shutil.copytree(run, folder)
    (folder / "model.safetensors").write_bytes(pickle.dumps(Malicious(victim)))
    assert "not the weights of this model" in error("predict", folder, files["with"])
    assert not victim.exists()
    pickle.loads(pickle.dumps(Malicious(victim))).close()  # else the above would show nothing
    assert victim.exists()


def test_thresholds_of_one_model_for_an_ensemble(error, run, files):
    words = (run, files["with"], "--ensemble", run, "--tuned-threshold")
    assert "not those of an --ensemble" in error("predict", *words)


def test_ensembles_of_unlike_models(error, run, files, two_classes, tmp_path, fast):
    other, table = tmp_path / "other", tmp_path / "table.tsv"
    text = files["with"].read_text().split()
    rows = [
        f"{name[1:]}\t{sequence}\t{i % 2}\n" for i, (name, sequence) in enumerate(zip(*[iter(text)] * 2, strict=True))
    ]
    table.write_text("id\tsequence\tlabel\n" + "".join(rows))
    assert main(["genomics", "train", "--table", str(table), "-o", str(other), *fast, "--epochs", "1"]) == 0
    for words in (["predict", run, files["with"]], ["eval", run, *two_classes, "-o", tmp_path / "e"]):
        line = error(*words, "--ensemble", other)
        assert str(other) in line
        assert "classes ('0', '1'), but" in line


def test_thresholds_where_there_are_none(error, run, files, two_classes, tmp_path):
    untuned = tmp_path / "untuned"
    shutil.copytree(run, untuned)
    (untuned / "thresholds.json").unlink()
    for words in (["predict", untuned, files["with"]], ["eval", untuned, *two_classes, "-o", tmp_path / "e"]):
        assert "--tuned-threshold needs a run folder of `train`" in error(*words, "--tuned-threshold")
    (untuned / "thresholds.json").write_text('{"with": 0.5}')
    assert "thresholds.json" in error("predict", untuned, files["with"], "--tuned-threshold")
    three = json.loads((untuned / "config.json").read_text())
    for change in ({"target": "regression", "classes": ["value"]}, {"classes": ["a", "b", "c"]}):
        (untuned / "config.json").write_text(json.dumps(three | change))
        line = error("predict", untuned, files["with"], "--tuned-threshold")
        assert "not the weights" in line or "decides between two classes" in line


def test_a_class_that_the_model_does_not_know(error, run, files, tmp_path):
    line = error("eval", run, "--class", f"third={files['with']}", "-o", tmp_path / "e")
    assert "class third: not among the known classes with, without" in line


def test_a_part_that_is_not_there(error, run, two_classes, tmp_path):
    line = error("eval", run, *two_classes, "-o", tmp_path / "e", "--split", "valid")
    assert "--split valid: no record is of this part" in line
