"""`polymamba genomics split` and `stats` as a user runs them: which part a record goes to, and what is told of it."""

import hashlib
import json

import numpy as np


def random_dna(rng: np.random.Generator, length: int) -> str:
    return "".join(rng.choice(list("ACGT"), length))


def test_splits_of_an_earlier_run(run, two_classes, fast, tmp_path, genomics):
    flags = ["--splits", run / "splits.tsv", "--seed", 7]
    genomics("train", *two_classes, "-o", tmp_path / "again", *fast, "--epochs", 1, *flags)
    assert (tmp_path / "again" / "splits.tsv").read_bytes() == (run / "splits.tsv").read_bytes()
    genomics("split", *two_classes, "-o", tmp_path / "split")  # by the seed of the run
    assert (tmp_path / "split" / "splits.tsv").read_bytes() == (run / "splits.tsv").read_bytes()
    genomics("split", *two_classes, "-o", tmp_path / "other", "--seed", 7)
    assert (tmp_path / "other" / "splits.tsv").read_bytes() != (run / "splits.tsv").read_bytes()


def parts_of(rows: list[list[str]], key) -> dict[str, set[str]]:
    """Of the rows of a splits.tsv: key(record name) -> the parts that its records are in."""
    parts: dict[str, set[str]] = {}
    for name, _, part, _ in rows[1:]:
        parts.setdefault(key(name), set()).add(part)
    return parts


def test_split_by_chromosome(tmp_path, genomics, read_tsv, write_fasta):
    rng = np.random.default_rng(6)
    names = [f"chr{1 + i % 7}:{100 * i}-{100 * i + 40}" for i in range(70)]
    both = [write_fasta(tmp_path / f"{x}.fa", [(name, random_dna(rng, 40)) for name in names]) for x in "ab"]
    flags = ["--class", f"a={both[0]}", "--class", f"b={both[1]}", "--split-by", "chromosome"]
    genomics("split", *flags, "-o", tmp_path / "dealt")
    genomics(
        "split", *flags, "-o", tmp_path / "named", "--valid-chromosomes", "chr2", "--test-chromosomes", "chr4", "chr7"
    )
    dealt, named = (
        parts_of(read_tsv(tmp_path / x / "splits.tsv"), lambda name: name.split(":")[0]) for x in ("dealt", "named")
    )
    assert set.union(*dealt.values()) == {"train", "valid", "test"}
    assert all(len(parts) == 1 for parts in dealt.values())
    assert named == {f"chr{i}": {{2: "valid", 4: "test", 7: "test"}.get(i, "train")} for i in range(1, 8)}


def test_split_by_cluster(tmp_path, capsys, genomics, read_tsv, write_fasta):
    """Families of sequences that differ in a few bases are never torn; record by record they are, and it is said."""
    rng = np.random.default_rng(7)

    def family(number: int) -> list[tuple[str, str]]:
        ancestor = random_dna(rng, 120)
        members = []
        for i in range(4):
            at = int(rng.integers(120))
            members.append((f"f{number}_{i}", ancestor[:at] + random_dna(rng, 1) + ancestor[at + 1 :]))
        return members

    flags = []
    for label in "ab":
        records = [record for number in range(25) for record in family(number)]
        flags += ["--class", f"{label}={write_fasta(tmp_path / f'{label}.fa', records)}"]
    torn = {}
    for how in ("record", "cluster"):
        genomics("split", *flags, "-o", tmp_path / how, "--split-by", how)
        rows = read_tsv(tmp_path / how / "splits.tsv")[1:]
        assert {part for _, _, part, _ in rows} == {"train", "valid", "test"}
        parts: dict[tuple[str, str], set[str]] = {}
        for name, label, part, _ in rows:
            parts.setdefault((label, name.split("_")[0]), set()).add(part)
        torn[how] = sum(len(found) > 1 for found in parts.values())
        assert json.loads((tmp_path / how / "leakage.json").read_text())
    assert torn["cluster"] == 0 < torn["record"]
    assert capsys.readouterr().out


def test_stats(files, two_classes, tmp_path, capsys, genomics):
    genomics("stats", *two_classes)
    tables = capsys.readouterr().out
    genomics("stats", *two_classes, "-o", tmp_path / "stats")
    assert capsys.readouterr().out == tables
    assert "without" in tables
    assert sorted(p.name for p in (tmp_path / "stats").iterdir()) == ["manifest.json", "stats.json", "stats.png"]
    assert "120" in (tmp_path / "stats" / "stats.json").read_text()
    manifest = json.loads((tmp_path / "stats" / "manifest.json").read_text())
    assert manifest["inputs_sha256"] == {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files.values()}
    assert (tmp_path / "stats" / "stats.png").read_bytes().startswith(b"\x89PNG")
