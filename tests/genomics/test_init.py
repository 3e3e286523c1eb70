"""Language models on the command line after pretraining: converted, fine-tuned from, scored, embedded, and back."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from polymamba.cli import main
from polymamba.genomics import Caduceus, DNAClassifier, tokenize
from polymamba.genomics.alphabet import PAD, N, complement, decode, reverse_complement
from polymamba.genomics.stored import embedding_model
from polymamba.genomics.windows import window_starts

GOLDEN = Path(__file__).parents[1] / "golden"
CPU = ("--device", "cpu")


def official_folder(case: str, folder: Path) -> Path:
    folder.mkdir(parents=True)
    shutil.copy(GOLDEN / f"caduceus_{case}" / "config.json", folder)
    shutil.copy(GOLDEN / f"caduceus_{case}" / "weights.safetensors", folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Case -> what `polymamba convert caduceus` makes of it."""
    at = tmp_path_factory.mktemp("converted")
    made = {}
    for case in ("ph_mlm", "ps_mlm", "ps_cls"):
        made[case] = at / case
        words = ["convert", "caduceus", str(official_folder(case, at / "official" / case)), str(made[case])]
        assert main(words) == 0
    return made


@pytest.fixture(scope="module")
def genome(tmp_path_factory) -> Path:
    rng = np.random.default_rng(5)
    path = tmp_path_factory.mktemp("genome") / "g.fa"
    path.write_text(
        "".join(f">chr{i}\n{''.join(rng.choice(list('AACGT'), n))}\n" for i, n in enumerate((700, 150, 90)))
    )
    return path


@pytest.fixture(scope="module")
def rcps_run(genome, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "ps"
    flags = ["--valid-chromosomes", "chr1", "--test-chromosomes", "chr2", "--length", "32", "--batch-size", "8"]
    kind = ["--objective", "masked", "--rcps", "--no-baselines", "--epochs", "2", *CPU]
    assert main(["genomics", "pretrain", str(genome), *flags, *kind, "-o", str(output)]) == 0
    return output


def train(two_classes, output: Path, *words: object) -> DNAClassifier:
    fast = ["--epochs", "2", "--batch-size", "16", "--lr", "5e-3", "--ema", "0", *CPU]
    assert main(["genomics", "train", *two_classes, "-o", str(output), *fast, *map(str, words)]) == 0
    return DNAClassifier.from_pretrained(output)


# convert


@pytest.mark.parametrize("case", ["ph_mlm", "ps_mlm", "ps_cls"])
def test_there_and_back(case, folders, tmp_path, capsys):
    back = tmp_path / "back"
    assert main(["convert", "caduceus", str(folders[case]), str(back), "--back"]) == 0
    ending = "SequenceClassification" if case == "ps_cls" else "MaskedLM"
    assert capsys.readouterr().err == f"CaduceusFor{ending} -> {back}\n"
    theirs, ours = load_file(GOLDEN / f"caduceus_{case}" / "weights.safetensors"), load_file(back / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())
    assert main(["convert", "caduceus", str(back), str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "config.json").read_text() == (folders[case] / "config.json").read_text()
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folders[case] / "model.safetensors").read_bytes()


def test_what_was_pretrained_here_goes_there(rcps_run, tmp_path):
    """And comes back as it was: what stands for N, the window, an even number of layers that change places there."""
    assert main(["convert", "caduceus", str(rcps_run), str(tmp_path / "there"), "--back"]) == 0
    config = json.loads((tmp_path / "there" / "config.json").read_text())
    assert (config["fused_add_norm"], config["n_layer"]) == (True, 2)
    assert main(["convert", "caduceus", str(tmp_path / "there"), str(tmp_path / "back")]) == 0
    ours, back = Caduceus.from_pretrained(rcps_run), Caduceus.from_pretrained(tmp_path / "back")
    assert ours.config == back.config
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in ours.state_dict().items())


def test_refusals_of_the_way_back(run, folders, tmp_path, capsys):
    for words, said in (
        (["mamba-ssm", folders["ph_mlm"]], "there is no way back to mamba-ssm, only to caduceus"),
        (["caduceus", run], "holds DNAClassifier, but a Caduceus is wanted here"),
        (["caduceus", tmp_path / "no"], f"{tmp_path / 'no'}: no such folder"),
    ):
        assert main(["convert", *map(str, words), str(tmp_path / "out"), "--back"]) == 1
        assert said in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


# train --init


@pytest.mark.parametrize("case", ["ph_mlm", "ps_mlm"])
def test_a_frozen_backbone_stays_as_it_was(case, two_classes, folders, tmp_path, capsys):
    model = train(two_classes, tmp_path / "run", "--init", folders[case], "--freeze")
    assert "of them learning" in capsys.readouterr().err
    source = Caduceus.from_pretrained(folders[case])
    for name, tensor in source.backbone.state_dict().items():
        assert torch.equal(model.backbone.state_dict()[name], tensor), name
    assert torch.equal(model.embedding.weight[:N], source.embedding.weight[:N])
    assert torch.equal(model.embedding.weight[N], source.embedding.weight[PAD]), "what stood for N in pretraining"
    assert model.config.both_strands == (case == "ps_mlm")
    assert model.head.weight.abs().max() > 0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["settings"]["init"] == str(folders[case])
    assert str(folders[case] / "model.safetensors") in manifest["inputs_sha256"]


def test_head_and_backbone_at_their_rates(two_classes, folders, tmp_path):
    """In the first step of AdamW every entry changes by its rate."""
    words = ["--init", folders["ph_mlm"], "--epochs", 1, "--warmup", 0, "--batch-size", 500, "--weight-decay", 0]
    source = Caduceus.from_pretrained(folders["ph_mlm"]).backbone.state_dict()
    for more, rate in ((["--backbone-lr", 1e-5], 1e-5), ([], 5e-4)):
        model = train(two_classes, tmp_path / f"run{rate}", *words, *more)
        changes = [(t - source[name]).abs().max().item() for name, t in model.backbone.state_dict().items()]
        assert max(changes) == pytest.approx(rate, rel=0.05)
        assert model.place is not None
        assert model.place.weight.abs().max().item() == pytest.approx(rate, rel=0.05)


@pytest.mark.parametrize("heads", [64, 0])
def test_a_classifier_of_both_strands(heads, two_classes, folders, tmp_path):
    """Says the same of either, padded or not, but not of another sequence."""
    model = train(two_classes, tmp_path / "run", "--init", folders["ps_mlm"], "--heads", heads).double()
    model.requires_grad_(False)
    short, long = tokenize("ACGGTTNACCATG"), tokenize("GGGTACCCGGATTACA" * 2)
    padded = torch.full((2, len(long)), PAD)
    padded[0, : len(short)], padded[1] = torch.tensor(short), torch.tensor(long)
    logits = model(padded, padded != PAD)
    for row, sequence in zip(logits, (short, long), strict=True):
        for strand in (sequence, reverse_complement(sequence)):
            alone = model(torch.tensor(strand)[None])
            assert (alone[0] - row).abs().max() < 1e-12 * row.abs().max()
            other = model(torch.tensor(complement(strand))[None])
            assert (other[0] - row).abs().max() > 1e-6


def test_strands(two_classes, folders, tmp_path):
    few = ["--epochs", 1, "--heads", 0]
    assert train(two_classes, tmp_path / "both", "--strands", "both", *few).config.both_strands
    one = train(two_classes, tmp_path / "one", "--init", folders["ps_mlm"], "--strands", "one", *few)
    assert not one.config.both_strands


def test_init_from_pretraining_is_learned_from(rcps_run, two_classes, tmp_path):
    train(two_classes, tmp_path / "run", "--init", rcps_run, "--heads", 0)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["accuracy"]["value"] > 0.6
    train(two_classes, tmp_path / "run", "--init", rcps_run, "--heads", 0, "--resume")
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == metrics


def test_refusals_of_init(error, two_classes, run, folders, tmp_path):
    words = ["train", *two_classes, "-o", tmp_path / "r"]
    assert "give --init, too" in error(*words, "--freeze", code=2)
    assert "give --init, too" in error(*words, "--backbone-lr", 1e-3, code=2)
    init = ["--init", folders["ph_mlm"]]
    assert "a frozen backbone learns at no rate" in error(*words, *init, "--freeze", "--backbone-lr", 1e-3, code=2)
    assert "backbone_lr is 0.0" in error(*words, *init, "--backbone-lr", 0, code=2)
    assert "no such run folder" in error(*words, "--init", tmp_path / "no")
    assert "holds DNAClassifier, but a DNALanguageModel is wanted here" in error(*words, "--init", run)
    assert "holds CaduceusClassifier, but" in error(*words, "--init", folders["ps_cls"])


# The other verbs


def test_a_model_of_both_strands_scores_either_alike(rcps_run, genome, tmp_path, capsys):
    assert json.loads((rcps_run / "config.json").read_text())["rcps"] is True
    lines = genome.read_text().split()
    other = decode(reverse_complement(tokenize(lines[3])))
    (tmp_path / "two.fa").write_text(f">a\n{lines[3]}\n>b\n{other}\n")
    capsys.readouterr()
    words = ["score", rcps_run, tmp_path / "two.fa", "--window", len(lines[3]), "--overlap", 0]
    assert main(["genomics", *map(str, words), *CPU]) == 0
    (_, *one), (_, *same) = (row.split("\t") for row in capsys.readouterr().out.splitlines()[1:])
    assert one == same  # bases that are hidden together are so on either strand
    assert 1.5 < float(one[3]) < 2.5


def test_variants_by_a_converted_model(folders, genome, tmp_path, capsys):
    """One base: the LLR is a difference of two logits."""
    text = genome.read_text().split()[1]
    allele = {"A": "C", "C": "G", "G": "T", "T": "A"}[text[99]]
    head = "##fileformat=VCFv4.2\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
    (tmp_path / "v.vcf").write_text(f"{head}chr0\t100\t.\t{text[99]}\t{allele}\t.\t.\t.\n")
    for case in ("ph_mlm", "ps_mlm"):
        words = ["variants", folders[case], tmp_path / "v.vcf", "--genome", genome, "--window", 40, "--no-both-strands"]
        capsys.readouterr()
        assert main(["genomics", *map(str, words), *CPU]) == 0
        found = float(capsys.readouterr().out.split("PM_LLR=")[1].split()[0])
        tokens = tokenize(f"{text[79:99]}N{text[100:119]}").astype(np.int64)
        tokens[20] = 3
        with torch.no_grad():
            logits = Caduceus.from_pretrained(folders[case])(torch.from_numpy(tokens)[None])[0, 20]
        expected = logits[7 + "ACGT".index(allele)] - logits[7 + "ACGT".index(text[99])]
        assert found == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("case", ["ph_mlm", "ps_mlm"])
def test_embed_by_a_language_model(case, folders, genome, tmp_path):
    output = tmp_path / "e.npy"
    words = ["embed", folders[case], genome, "--window", 700, "-o", output]
    assert main(["genomics", *map(str, words), *CPU]) == 0
    found, model = np.load(output), Caduceus.from_pretrained(folders[case])
    for row, text in zip(found, genome.read_text().split()[1::2], strict=True):
        with torch.no_grad():
            strands = model.hidden(torch.from_numpy(tokenize(text).astype(np.int64))[None])
        expected = strands.flip(-1) if model.config.mirrored else strands  # of the frame in which it was pretrained
        assert row == pytest.approx(expected.mean((0, 1, 2)).numpy(), abs=1e-4)


@pytest.fixture(scope="module")
def causal_run(genome, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "causal"
    flags = ["--valid-chromosomes", "chr1", "--test-chromosomes", "chr2", "--length", "32", "--steps-per-epoch", "2"]
    words = [*flags, "--no-baselines", "--epochs", "1", *CPU, "-o", str(output)]
    assert main(["genomics", "pretrain", str(genome), *words]) == 0
    return output


@pytest.mark.parametrize("stride", [20, 50, 70])
def test_embed_in_record_by_a_causal_model_is_one_shot(stride, causal_run, genome, tmp_path):
    output = tmp_path / "e.npy"
    words = ["--window", 50, "--stride", stride, "--in-record", "--max-tokens", 64, "-o", output, *CPU]
    assert main(["genomics", *map(str, ["embed", causal_run, genome, *words])]) == 0
    model = embedding_model(causal_run)
    expected = []
    for text in genome.read_text().split()[1::2]:
        with torch.no_grad():
            states = model.states(torch.from_numpy(tokenize(text).astype(np.int64))[None])[0]
        expected += [states[at : at + 50].mean(0).numpy() for at in window_starts(len(text), 50, stride)]
    np.testing.assert_allclose(np.load(output), np.stack(expected), atol=1e-5)


@pytest.mark.parametrize("case", ["ph_mlm", "ps_mlm"])
def test_embed_in_record_sees_more_on_either_side(case, folders, genome, tmp_path, capsys):
    output = tmp_path / "e.npy"
    words = ["--window", 40, "--in-record", "--overlap", 25, "--one-shot", "-o", output, *CPU]
    assert main(["genomics", *map(str, ["embed", folders[case], genome, *words])]) == 0
    said = capsys.readouterr().err
    assert "windows of 40 bases, with 12 and 13 more beside them" in said
    model, rows = embedding_model(folders[case]), np.load(output)
    found, in_one = iter(rows), []
    for text in genome.read_text().split()[1::2]:
        with torch.no_grad():
            whole = model.states(torch.from_numpy(tokenize(text).astype(np.int64))[None])[0]
        in_one += [whole[at : at + 40].mean(0).numpy() for at in window_starts(len(text), 40, 40)]
        for at in window_starts(len(text), 40, 40)[:-1]:  # the last one is moved back, into two of these
            first, last = max(0, at - 12), min(len(text), at + 53)
            with torch.no_grad():
                states = model.states(torch.from_numpy(tokenize(text[first:last]).astype(np.int64))[None])[0]
            assert next(found) == pytest.approx(states[at - first : at - first + 40].mean(0).numpy(), abs=1e-4)
        next(found)
    difference = np.linalg.norm(rows - np.stack(in_one), axis=1) / np.linalg.norm(np.stack(in_one), axis=1)
    told = re.search(r"by ([0-9.]+)% of their length in the mean, ([0-9.]+)% at most", said.replace("\n", " "))
    assert [float(figure) for figure in told.groups()] == pytest.approx(
        [100 * difference.mean(), 100 * difference.max()], abs=0.02
    )


def test_embed_in_record_errors(causal_run, two_classes, genome, tmp_path, capsys):
    words = ["genomics", "embed", str(causal_run), str(genome), "-o", str(tmp_path / "e.npy"), *CPU]
    assert main([*words, "--in-record", "--overlap", "3"]) == 1
    assert "--overlap is of models that see both ways" in capsys.readouterr().err
    train(two_classes, tmp_path / "places")
    assert main(["genomics", "embed", str(tmp_path / "places"), *words[3:], "--in-record"]) == 1
    assert "is told where in a window a base stands" in capsys.readouterr().err


def test_the_last_base_is_what_the_head_sees(causal_run, folders, two_classes, tmp_path, capsys):
    model = train(
        two_classes, tmp_path / "last", "--init", causal_run, "--last-base", "--steps-per-epoch", 2, "--dropout", 0.25
    )
    assert model.config.backbone.dropout == 0.25
    assert model.pooling is None
    tokens = torch.randint(7, 11, (2, 30))
    mask = torch.arange(30) < torch.tensor([30, 17])[:, None]
    with torch.no_grad():
        found = model(tokens, mask)
        alone = model(tokens[1:, :17])
        h = model.backbone(model.embedding(tokens[:1]))[:, -1]
        expected = model.head(model.mean_norm(h))
    assert torch.allclose(found[1], alone[0], atol=1e-5)
    assert torch.allclose(found[0], expected[0], atol=1e-5)
    words = ["genomics", "train", *two_classes, "-o", str(tmp_path / "ph"), "--last-base", *CPU]
    assert main([*words, "--init", str(folders["ph_mlm"])]) == 1
    assert "sees both ways" in capsys.readouterr().err
