"""What is installed: every package, its data, its commands, under names of its own."""

import tomllib
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = {"numflash": "numflash", "tuner": "numflash_tuner"}


def test_every_package_is_installed():
    found = {
        ".".join([name, *file.parent.relative_to(ROOT / folder).parts])
        for folder, name in FOLDERS.items()
        for file in (ROOT / folder).rglob("__init__.py")
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == found


def test_no_top_level_name_can_clash():
    packages = PROJECT["tool"]["setuptools"]["packages"]
    assert {name.partition(".")[0] for name in packages} == set(FOLDERS.values())
    assert PROJECT["tool"]["setuptools"]["package-dir"] == {v: k for k, v in FOLDERS.items()}


def test_data_files_are_installed():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["*"]
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*.*"):
            if file.suffix not in (".py", ".pyc") and not file.name.startswith("."):
                assert any(file.match(pattern) for pattern in patterns), file


def test_commands_and_entry_points_exist():
    targets = list(PROJECT["project"]["scripts"].values())
    for group in PROJECT["project"]["entry-points"].values():
        targets += group.values()
    for target in targets:
        module, _, name = target.partition(":")
        assert callable(getattr(import_module(module), name))
