"""What is made once: kept while it is whole, made anew when it was damaged, and not there when making it fails."""

import json
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
    made = made_once(tmp_path, WHAT, 1, make)
    before = files(made)
    assert made_once(tmp_path, WHAT, 1, pytest.fail) == made
    assert files(made) == before
    other = made_once(tmp_path, WHAT | {"share": 0.2}, 1, make)
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
        ("manifest.json", lambda path: change(path, layout=0), "has layout 0, of another version of polymamba"),
    ],
)
def test_damage_is_seen_said_and_repaired(name, damage, words, tmp_path, capsys):
    made = made_once(tmp_path, WHAT, 1, make)
    before = {path: content for path, (content, _) in files(made).items()}
    damage(made / name)
    capsys.readouterr()
    assert made_once(tmp_path, WHAT, 1, make) == made
    said = capsys.readouterr().err
    assert words in said
    assert "building it anew" in said
    assert {path: content for path, (content, _) in files(made).items()} == before


def test_nothing_is_left_where_making_fails(tmp_path):
    def fail(folder: Path) -> None:
        make(folder)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        made_once(tmp_path, WHAT, 1, fail)
    assert list(tmp_path.iterdir()) == []
