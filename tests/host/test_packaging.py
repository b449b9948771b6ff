"""The installation: every package, its data, its commands, under names of its own.

And the description that a package index shows, and the packages that it installs with it.
"""

import json
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest

from numflash.runtime.switches import is_on

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


def test_an_extra_is_for_what_is_installed():
    """None is of a folder that stays in the repository, and each that is told of exists."""
    extras = PROJECT["project"]["optional-dependencies"]
    left_out = {path.name for path in ROOT.iterdir() if path.is_dir()} - set(FOLDERS)
    assert not set(extras) & left_out
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "pyproject.toml"]
    for folder in ("numflash", "tuner", "bench", "docs", "examples"):
        files += [f for f in (ROOT / folder).rglob("*.*") if f.suffix in (".py", ".md", ".toml")]
    for file in files:
        for names in re.findall(r"numflash\[([\w,]+)\]", file.read_text(encoding="utf-8")):
            assert set(names.split(",")) <= set(extras), file


# A link or picture of Markdown: its text and where it leads.
LINK = re.compile(r"!?\[([^\]]*)\]\(([^)\s]*)\)")
ELSEWHERE = ("https://", "#")


PAGES = sorted(
    str(path.relative_to(ROOT))
    for folder in (ROOT, ROOT / "docs", ROOT / "examples" / "data")
    for path in folder.glob("*.md")
)


def anchors(page: Path) -> set[str]:
    """The headings of a page, as links name them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_of_the_repository_lead_somewhere(name):
    for _, link in LINK.findall((ROOT / name).read_text(encoding="utf-8")):
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        page = (ROOT / name).parent / target if target else ROOT / name
        assert page.is_file() and (not anchor or anchor in anchors(page)), link


# A file or folder that a page names in code, as `tuner/cli.py`, `runtime/sums.py` or `ptx/`.
NAMED_FILE = re.compile(r"`([\w./-]+(?:/|\.(?:py|toml|json|md|svg)))`")


@pytest.mark.parametrize("name", PAGES)
def test_files_that_a_page_names_exist(name):
    """From the repository, from numflash, or, without a folder, anywhere in them."""
    for named in NAMED_FILE.findall((ROOT / name).read_text(encoding="utf-8")):
        places = [ROOT / named, ROOT / "numflash" / named, (ROOT / name).parent / named]
        found = any(place.exists() for place in places)
        if not found and "/" not in named:
            folders = ("numflash", "tuner", "bench", "tests", "examples")
            found = any(True for folder in folders for _ in (ROOT / folder).rglob(named))
        assert found, named


def test_the_pages_keep_their_length():
    """Architecture is read at one sitting."""
    lines = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 120


def assert_complete(description):
    """That a text can be shown where there are no files beside it."""
    assert all(target.startswith(ELSEWHERE) for _, target in LINK.findall(description))
    for text, target in LINK.findall((ROOT / "README.md").read_text(encoding="utf-8")):
        assert target.endswith(".svg") or text in description
    assert "<img" not in description and description.startswith("# numflash")


def test_the_description_needs_no_other_file(monkeypatch):
    given = {}
    setuptools = SimpleNamespace(setup=lambda **keywords: given.update(keywords))
    monkeypatch.setitem(sys.modules, "setuptools", setuptools)
    runpy.run_path(str(ROOT / "setup.py"))
    assert PROJECT["project"]["dynamic"] == ["readme"]
    assert given["long_description_content_type"] == "text/markdown"
    assert_complete(given["long_description"])


def test_an_index_can_find_it():
    project = PROJECT["project"]
    kinds = {name.partition(" :: ")[0] for name in project["classifiers"]}
    assert kinds >= {"Development Status", "Environment", "Intended Audience", "Topic"}
    assert "License" not in kinds  # the expression in `license` stands for it
    assert project["requires-python"] == ">=3.11"
    assert "Programming Language :: Python :: 3.11" in project["classifiers"]
    assert len(project["keywords"]) == len(set(project["keywords"])) > 0
    # Only addresses that are known: an index shows them as the project's own.
    assert all(url.startswith("https://") for url in project.get("urls", {}).values())


def test_cupy_knows_bfloat16():
    """CuPy below 14 refuses bfloat16 that comes through DLPack."""
    for extra in ("cu12", "cu13"):
        (cupy,) = [x for x in PROJECT["project"]["optional-dependencies"][extra] if "cupy" in x]
        assert int(re.search(r">=(\d+)", cupy)[1]) >= 14


# Of CUDA 12 and 13 only one can be installed. `compile` has CUDA 13.
ONE_OF = {"cu12": {"cu13", "compile"}, "cu13": {"cu12"}}


@pytest.mark.skipif(
    not is_on("NUMFLASH_TEST_PIP"),
    reason="set NUMFLASH_TEST_PIP=1 to ask pip whether every extra can be installed (400 MB)",
)
def test_pip_finds_all_that_the_extras_need(tmp_path):
    # A copy, because building writes beside pyproject.toml.
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    extras = set(PROJECT["project"]["optional-dependencies"])
    report = tmp_path / "report.json"
    # Packages installed here count: pip downloads the metadata of the rest.
    pip = [sys.executable, "-m", "pip", "install", "--dry-run", "--quiet", f"--report={report}"]
    for one, others in ONE_OF.items():
        wanted = f"{tmp_path}[{','.join(sorted(extras - others))}]"
        done = subprocess.run([*pip, wanted], capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, f"{one}: {done.stderr}"
        found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
        (own,) = [metadata for metadata in found if metadata["name"] == "numflash"]
        assert set(own["provides_extra"]) == extras
        assert_complete(own["description"])
