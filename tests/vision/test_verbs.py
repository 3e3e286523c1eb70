"""`polymamba vision ...` as a user runs it: pictures in, files out, one clear line when something is wrong."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import tyro
from PIL import Image
from safetensors.torch import load_file

from polymamba.cli import main
from polymamba.core.config import TrainConfig
from polymamba.vision import load_image_model
from polymamba.vision.commands import Augment, Train, Training
from polymamba.vision.config import PRESETS, RECIPES, Augmentation, ModelName, RecipeName
from polymamba.vision.plots import calibration_error
from polymamba.vision.sources import read_source
from polymamba.vision.training import TrainImages
from polymamba.vision.transforms import data_config

FAST = ["--model", "test_vmamba", "--size", "16", "--batch-size", "8", "--device", "cpu", "--lr", "0.01"]


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "run"
    assert main(["vision", "train", str(pictures), "-o", str(output), *FAST, "--epochs", "6"]) == 0
    return output


def read_csv(path: Path, delimiter=",") -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter=delimiter))


def test_train_leaves_a_run_that_explains_itself(run):
    assert {p.name for p in run.iterdir()} >= {
        *("config.json", "model.safetensors", "splits.tsv", "labels.json", "metrics.json", "log.jsonl", "curves.png"),
        *("manifest.json", "predictions.tsv", "confusion.tsv", "confusion.png", "calibration.png", "mistakes.png"),
    }
    settings = json.loads((run / "manifest.json").read_text())["settings"]
    assert (settings["parts"], settings["epochs"], settings["mixup"]) == ({"train": 30, "valid": 3, "test": 3}, 6, 0)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["accuracy"]["value"] == 1  # three colours
    assert metrics["top5_accuracy"] == 1
    assert 0 <= metrics["calibration_error"] <= 1
    model = load_image_model(run)
    assert model.pretrained_cfg["label_names"] == ["blue", "green", "red"]
    assert data_config(model)["input_size"] == (3, 16, 16)
    for name in ("confusion.png", "calibration.png", "mistakes.png", "curves.png"):
        assert Image.open(run / name).size[0] > 50


def test_a_run_is_a_model_of_timms(run):
    model = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    assert model.num_classes == 3
    assert timm.data.resolve_data_config(model=model)["input_size"] == (3, 16, 16)
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(model(x), load_image_model(run)(x))
    other = timm.create_model(f"local-dir:{run}", pretrained=True, num_classes=5, in_chans=1)
    assert other(x[:, :1]).shape == (2, 5)


@pytest.mark.parametrize("changes", [{}, {"--mixup": "0.8", "--cutmix": "1", "--workers": "1"}])
def test_a_killed_run_ends_with_the_same_weights(pictures, tmp_path, changes, monkeypatch):
    words = [*FAST, "--epochs", "2", "--save-every", "1", *(w for pair in changes.items() for w in pair)]
    assert main(["vision", "train", str(pictures), "-o", str(tmp_path / "whole"), *words]) == 0
    batches = 0
    step = TrainImages.loss

    def killed(self, model, batch):
        nonlocal batches
        batches += 1
        if batches == 4:
            raise KeyboardInterrupt
        return step(self, model, batch)

    monkeypatch.setattr(TrainImages, "loss", killed)
    assert main(["vision", "train", str(pictures), "-o", str(tmp_path / "cut"), *words]) == 1
    monkeypatch.undo()
    resume = ["vision", "train", str(pictures), "-o", str(tmp_path / "cut"), *words, "--resume"]
    assert main([*resume, "--flip", "0"]) == 1  # other settings are another run
    assert main(resume) == 0
    whole, cut = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    for name in whole:
        assert torch.equal(whole[name], cut[name]), name


def test_init_from_a_run(run, pictures, tmp_path, capsys):
    """The head stays for the same classes; for others it is fresh and the rest the same."""
    words = [
        "--init",
        str(run),
        "--recipe",
        "finetune",
        "--epochs",
        "1",
        "--lr",
        "1e-9",
        "--ema",
        "0",
        "--device",
        "cpu",
    ]
    assert main(["vision", "train", str(pictures), "-o", str(tmp_path / "same"), *words]) == 0
    assert "a fresh head" not in capsys.readouterr().err
    assert json.loads((tmp_path / "same" / "metrics.json").read_text())["accuracy"]["value"] == 1
    shutil.copytree(pictures, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "red")
    assert main(["vision", "train", str(tmp_path / "data"), "-o", str(tmp_path / "other"), *words, "--size", "24"]) == 0
    assert "a fresh head for 2 classes" in capsys.readouterr().err
    other, before = load_image_model(tmp_path / "other"), load_image_model(run)
    assert (other.num_classes, data_config(other)["input_size"]) == (2, (3, 24, 24))
    assert torch.allclose(other.layers[0].blocks[0].op.Ds, before.layers[0].blocks[0].op.Ds, atol=1e-6)


@pytest.fixture(scope="module")
def odd(pictures, tmp_path_factory) -> Path:
    """Good, odd and bad files."""
    folder = tmp_path_factory.mktemp("odd")
    red = Image.open(pictures / "red" / "0.png")
    red.convert("CMYK").save(folder / "cmyk.jpg")
    red.convert("P").save(folder / "palette.gif")
    red.convert("RGBA").save(folder / "alpha.png")
    red.resize((600, 1)).save(folder / "strip.png")
    red.resize((1, 1)).save(folder / "pixel.png")
    red.resize((6000, 4000)).save(folder / "huge.jpg")
    grey = np.asarray(red.convert("L"))
    Image.fromarray(grey).save(folder / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "grey_of_16_bits.png")
    upright = Image.open(pictures / "green" / "0.png")
    upright.paste(red, (0, 8))
    upright.save(folder / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.png", exif=exif)
    (folder / "bomb.pbm").write_bytes(b"P4 40000 10000\n")
    (folder / "cut.png").write_bytes((pictures / "red" / "0.png").read_bytes()[:300])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("no image")
    (folder / "notes.txt").write_text("passed over")
    return folder


def test_predict_goes_on_past_bad_files(run, odd, tmp_path, capsys):
    words = ["vision", "predict", str(run), str(odd), "--device", "cpu", "--top-k", "2", "--batch-size", "4"]
    assert main([*words, "-o", str(tmp_path / "out.csv")]) == 0
    assert "4 of 14 images could not be read" in capsys.readouterr().err
    rows = {Path(row["image"]).name: row for row in read_csv(tmp_path / "out.csv")}
    assert list(rows) == sorted(rows)
    assert {name for name, row in rows.items() if row["error"]} == {
        *("cut.png", "empty.png", "text.jpg", "bomb.pbm"),
    }
    assert "more than 178,956,970 pixels" in rows["bomb.pbm"]["error"]
    for name in ("cmyk.jpg", "palette.gif", "alpha.png", "strip.png", "pixel.png", "huge.jpg"):
        assert rows[name]["class_1"] == "red", name
        assert float(rows[name]["probability_1"]) >= float(rows[name]["probability_2"]) > 0
    for name, same in (("turned.png", "upright.png"), ("grey_of_16_bits.png", "grey.png")):
        assert {**rows[name], "image": ""} == {**rows[same], "image": ""}
    assert rows["cut.png"]["class_1"] == ""
    assert "cut.png" in rows["cut.png"]["error"]
    assert main([*words, "-o", str(tmp_path / "out.json"), "--workers", "1"]) == 0
    found = {Path(row["image"]).name: row for row in json.loads((tmp_path / "out.json").read_text())}
    assert found["alpha.png"]["classes"][0]["class"] == "red"
    assert f"{found['alpha.png']['classes'][0]['probability']:.6f}" == rows["alpha.png"]["probability_1"]
    assert "error" in found["empty.png"]
    capsys.readouterr()
    assert main([*words[:3], str(odd / "alpha.png"), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split("\t")[1] == "red"


def test_predict_refuses(run, odd, tmp_path, capsys):
    for words, said in (
        ([str(tmp_path / "none.png")], "none.png: no such file"),
        ([str(odd), "-o", str(tmp_path / "a.txt")], "name it .csv, .tsv or .json"),
        ([str(odd / "*.webp")], "no image in"),
    ):
        assert main(["vision", "predict", str(run), *words, "--device", "cpu"]) == 1
        assert said in capsys.readouterr().err
    assert main(["vision", "predict", str(odd), str(odd), "--device", "cpu"]) == 1
    assert "no config.json" in capsys.readouterr().err


def test_eval_says_what_train_said(run, tmp_path, capsys):
    """On the test images, as a table; the same figures."""
    rows = [row for row in read_csv(run / "splits.tsv", "\t") if row["part"] == "test"]
    table = tmp_path / "test.csv"
    table.write_text("image,label\n" + "".join(f"{row['image']},{row['class']}\n" for row in rows))
    assert main(["vision", "eval", str(run), str(table), "-o", str(tmp_path / "e"), "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert "calibration error" in said.out
    assert "warning" not in said.err
    ours, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path / "e", run))
    assert ours["confusion"] == theirs["confusion"]
    assert ours["calibration_error"] == pytest.approx(theirs["calibration_error"], abs=1e-5)

    wrong = tmp_path / "wrong.csv"
    wrong.write_text(
        "image,label\n" + "".join(f"{row['image']},{'red' if i else 'blue'}\n" for i, row in enumerate(rows))
    )
    assert main(["vision", "eval", str(run), str(wrong), "-o", str(tmp_path / "w"), "--device", "cpu"]) == 0
    metrics = json.loads((tmp_path / "w" / "metrics.json").read_text())
    predictions = read_csv(tmp_path / "w" / "predictions.tsv", "\t")
    assert metrics["accuracy"]["value"] == np.mean([p["true"] == p["predicted"] for p in predictions]) < 1
    assert [p["predicted"] for p in predictions] == [row["class"] for row in rows]


def test_eval_warns_of_images_that_were_trained_on(run, pictures, tmp_path, capsys, monkeypatch):
    """Under another name of the same path, too."""
    monkeypatch.chdir(pictures.parent)
    words = ["vision", "eval", str(run), pictures.name, "-o", str(tmp_path / "e"), "--device", "cpu"]
    assert main(words) == 0
    assert "warning: 33 of 36 images stand in the model's own train or valid part" in capsys.readouterr().err


def test_eval_refuses(run, pictures, odd, tmp_path, capsys):
    (tmp_path / "t.csv").write_text(
        f"image,label,part\n{pictures}/red/1.png,red,train\n{pictures}/red/2.png,cat,train\n"
    )
    for words, said in (([], "no part 'test'; there are train"), (["--part", "train"], "class 'cat' of the images")):
        code = main(["vision", "eval", str(run), str(tmp_path / "t.csv"), "-o", str(tmp_path / "e"), *words])
        assert code == 1
        assert said in capsys.readouterr().err
    shutil.copy(odd / "cut.png", tmp_path / "cut.png")
    (tmp_path / "c.csv").write_text(f"image,label\n{pictures}/red/1.png,red\ncut.png,blue\n")
    for workers in ("0", "1"):
        words = [str(tmp_path / "c.csv"), "-o", str(tmp_path / "e"), "--workers", workers]
        assert main(["vision", "eval", str(run), *words]) == 1
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert "cut.png: a damaged image" in said
        assert "Traceback" not in said
    assert not (tmp_path / "e").exists()


def test_train_refuses_what_it_cannot_read(pictures, odd, tmp_path, capsys):
    shutil.copytree(pictures, tmp_path / "data")
    shutil.copy(odd / "cut.png", tmp_path / "data" / "red")
    shutil.copy(odd / "empty.png", tmp_path / "data" / "blue")
    words = ["vision", "train", str(tmp_path / "data"), "-o", str(tmp_path / "run"), *FAST, "--epochs", "1"]
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "empty.png: " in said
    assert "1 more cannot be read; --skip-unreadable leaves them out" in said
    assert not (tmp_path / "run").exists()
    assert main([*words, "--skip-unreadable"]) == 0
    assert "2 images left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--recipe", "finetune"], "say with --init"),
        (["--flip", "2"], "flip is 2.0"),
        (["--epochs", "0"], "epochs is 0"),
        (["--valid-fraction", "0"], "valid_fraction is 0.0"),
        (["--drop-path", "1"], "drop_path is 1.0"),
    ],
)
def test_wrong_flags(pictures, tmp_path, capsys, words, said):
    assert main(["vision", "train", str(pictures), "-o", str(tmp_path / "r"), *words]) == 2
    assert said in capsys.readouterr().err


def test_flags_and_recipes_name_the_same_things():
    assert set(ModelName.__args__) == set(PRESETS)
    assert set(RecipeName.__args__) == set(RECIPES)
    assert set(Augment.__dataclass_fields__) == set(Augmentation.__dataclass_fields__)
    of_sequences = {"max_tokens", "context_parallel", "expert_parallel"}
    assert set(Training.__dataclass_fields__) == set(TrainConfig.__dataclass_fields__) - of_sequences
    args = Train(data=Path("d"), output=Path("o"), recipe="vim", train=Training(lr=0.5), augment=Augment(mixup=0.0))
    assert (args.training().lr, args.training().epochs) == (0.5, 300)
    assert (args.augmentation().mixup, args.augmentation().cutmix) == (0.0, 1.0)


@pytest.mark.parametrize("name", ["cuda_graph", "gradient_checkpointing", "fsdp"])
def test_a_switch_takes_no_value(name):
    words = ["photos", "-o", "run"]
    assert not getattr(tyro.cli(Train, args=words).training(), name)
    assert getattr(tyro.cli(Train, args=[*words, f"--{name.replace('_', '-')}"]).training(), name)


def test_a_batch_depends_on_its_arguments_only(pictures):
    """Not on what was drawn before, which it leaves as it was; and every epoch shows other views."""
    images = read_source(pictures)
    model = PRESETS["test_vmamba"]
    view = {
        "input_size": (3, 16, 16),
        "interpolation": "bicubic",
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "crop_pct": 1.0,
    }
    augment = Augmentation(mixup=0.8, cutmix=1.0, auto_augment="rand-m9-mstd0.5-inc1")
    task = TrainImages(images, images, TrainConfig(batch_size=7), augment, view, seed=1)
    plan = task.plan(0)
    assert sorted(np.concatenate(plan).tolist()) == list(range(36))
    assert {len(b) for b in plan} <= {7, 8}
    first = task.batch(plan[1], 0)
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist()
    torch.rand(3)
    again = task.batch(plan[1], 0)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert before[1] == np.random.get_state()[1].tolist()
    other = task.batch(plan[1], 1)
    assert not torch.equal(first[0], other[0])
    assert torch.allclose(first[1].sum(1), torch.ones(len(plan[1])))
    assert model.num_classes == 1000


def test_calibration_error_by_hand():
    found = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.45, 0.55]])
    error, bins = calibration_error(found, np.array([0, 1, 1, 0]), n_bins=10)
    # 0.9: half right; 0.6: right; 0.55: wrong
    assert error == pytest.approx(0.5 * 0.4 + 0.25 * 0.4 + 0.25 * 0.55)
    assert [row["n"] for row in bins] == [1, 1, 2]
