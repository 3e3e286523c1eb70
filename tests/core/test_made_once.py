"""What is made once: kept while it is whole, made anew when it was damaged, and not there when making it fails."""

import json
import os
from pathlib import Path

import pytest

from polymamba.core.made_once import made_once

WHAT = {"letters": ["a", "b"], "share": 0.1}


def make(folder: Path) -> None:
    (folder / "one").write_bytes(b"12345")
    (folder / "two").write_bytes(b"")


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    """name -> (content, time of writing)."""
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_made_once_for_each_thing(tmp_path):
    made = made_once(tmp_path, WHAT, make)
    before = files(made)
    assert made_once(tmp_path, WHAT, pytest.fail) == made
    assert files(made) == before
    other = made_once(tmp_path, WHAT | {"share": 0.2}, make)
    assert sorted(tmp_path.iterdir()) == sorted([made, other])


def change(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("one", lambda path: path.write_bytes(b"12355"), "one is damaged (its checksum is another one)"),
        ("one", lambda path: path.write_bytes(b"1234"), "one is damaged"),
        ("two", Path.unlink, "damaged (FileNotFoundError)"),
        ("manifest.json", Path.unlink, "damaged (FileNotFoundError)"),
        ("manifest.json", lambda path: path.write_text('{"letters":'), "damaged (JSONDecodeError)"),
        ("manifest.json", lambda path: path.write_text("[]"), "damaged (TypeError)"),
        ("manifest.json", lambda path: change(path, letters=[]), "manifest.json lists other letters"),
        ("manifest.json", lambda path: change(path, sha256=7), "damaged (TypeError)"),
    ],
)
def test_damage_is_seen_said_and_repaired(name, damage, words, tmp_path, capsys):
    made = made_once(tmp_path, WHAT, make)
    before = {path: content for path, (content, _) in files(made).items()}
    damage(made / name)
    capsys.readouterr()
    assert made_once(tmp_path, WHAT, make) == made
    said = capsys.readouterr().err
    assert words in said
    assert "building it anew" in said
    assert {path: content for path, (content, _) in files(made).items()} == before


def test_nothing_is_left_where_making_fails(tmp_path):
    def fail(folder: Path) -> None:
        make(folder)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        made_once(tmp_path, WHAT, fail)
    assert list(tmp_path.iterdir()) == []


def test_what_another_made_meanwhile_is_taken(tmp_path):
    def slowly(folder: Path) -> None:
        made_once(tmp_path, WHAT, make)
        make(folder)

    made = made_once(tmp_path, WHAT, slowly)
    assert list(tmp_path.iterdir()) == [made]
    assert (made / "one").read_bytes() == b"12345"


def test_what_a_killed_process_of_this_number_left_is_no_hindrance(tmp_path):
    made = made_once(tmp_path, WHAT, make)
    made.rename(tmp_path / f".{made.name}.writing-{os.getpid()}")
    assert made_once(tmp_path, WHAT, make) == made
    assert list(tmp_path.iterdir()) == [made]


def test_other_processes_take_what_they_find(tmp_path, monkeypatch):
    made = made_once(tmp_path, WHAT, make)
    (made / "one").write_bytes(b"other")
    monkeypatch.setenv("RANK", "1")
    assert made_once(tmp_path, WHAT, pytest.fail) == made
    assert (made / "one").read_bytes() == b"other"
