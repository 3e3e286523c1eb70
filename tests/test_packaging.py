"""What an install from this very tree hides: a package, a link, a file or a pin that is missing."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LINKS = ROOT / ".path" / "polymamba"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES: list[str] = PYPROJECT["tool"]["setuptools"]["packages"]
PACKAGE_DIR: dict[str, str] = PYPROJECT["tool"]["setuptools"]["package-dir"]


def tracked() -> list[Path]:
    """The files of the repository, those about to be added included; what git ignores is none of ours."""
    git = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(git, capture_output=True, check=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def folder(package: str) -> Path:
    """Where setuptools takes `package` from: its own package-dir entry, or a folder below its parent's."""
    if package in PACKAGE_DIR:
        return ROOT / PACKAGE_DIR[package]
    parent, _, name = package.rpartition(".")
    return folder(parent) / name


def test_every_package_folder_is_declared():
    found = {path.parent for path in tracked() if path.name == "__init__.py" and path.parent != LINKS}
    assert found == {folder(package) for package in PACKAGES}
    assert set(PACKAGE_DIR) == {package for package in PACKAGES if package.count(".") < 2}


def test_packages_hold_no_undeclared_data():
    """A file beside the code that no wheel would hold."""
    declared = PYPROJECT["tool"]["setuptools"]["package-data"]
    shipped = {path for package in PACKAGES for path in folder(package).glob("*.py")}
    for package, patterns in declared.items():
        for pattern in patterns:
            matched = set(folder(package).glob(pattern))
            assert matched, f"package-data {pattern!r} of {package} matches nothing"
            shipped |= matched
    roots = [folder(package) for package in PACKAGES]
    inside = {path for path in tracked() if any(path.is_relative_to(root) for root in roots)}
    assert sorted(map(str, inside - shipped)) == []


def test_links_stand_for_an_install():
    """`PYTHONPATH=.path` finds what an install would: the facade's modules and one folder a subpackage."""
    facade = ROOT / PACKAGE_DIR["polymamba"]
    expected = {path.name: path for path in facade.glob("*.py")}
    expected |= {name.removeprefix("polymamba."): ROOT / path for name, path in PACKAGE_DIR.items() if "." in name}
    links = {link.name: link for link in LINKS.iterdir() if link.name != "__pycache__"}
    assert {name: link.resolve() for name, link in links.items()} == expected
    assert not [name for name, link in links.items() if link.readlink().is_absolute()]


def test_lock_pins_every_dependency():
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    wanted = list(PYPROJECT["project"]["dependencies"])
    for extra in PYPROJECT["project"]["optional-dependencies"].values():
        wanted += extra
    for requirement in map(Requirement, wanted):
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement.name} is not in requirements.lock: make it anew"
        assert requirement.specifier.contains(pin), f"requirements.lock has {pin}, pyproject.toml wants {requirement}"


def test_lock_is_plain_pins():
    """Constraints for any index: no address, no file, no option."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    assert [line for line in lines if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*==[\w.]+( ; .+)?", line)] == []


def test_no_file_names_a_machine():
    """No registry's address and no path of the machine that a file was made on."""
    private = re.compile(
        "|".join(
            [
                "python" + "hosted",  # in two parts, so that this file passes
                r"pypi\.org/" + "simple",
                r"(?<![\w.])/(home|Users)/\w+/",
                *(re.escape(f"{path}/") for path in (ROOT, Path.home()) if len(path.parts) > 1),
            ]
        )
    )
    for path in tracked():
        text = path.read_bytes().decode(errors="ignore")
        found = private.search(text)
        assert found is None, f"{path.relative_to(ROOT)} names {found[0]!r}"
