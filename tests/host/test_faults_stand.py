"""Every fault that a test puts into a kernel stands in the sources, also where few of them run."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support import faults

_TESTS = Path(__file__).parent.parent
_PLUGIN = "tests.support.dry_faults"
_IMPORTS_FAULTS = f"from {faults.__name__} import"
_STALE = f"""
import pytest
{_IMPORTS_FAULTS} Dropped, Mutation, load

DELTA = "numflash.kernels.shared.delta"
FAULTS = [
    Mutation("right", "total - of_rows.dlse", "total"),
    Mutation("no more", "total - of_no_row", "total"),
    Mutation("in one place", "total - of_rows.dlse", "total", times=2),
    Dropped("make_nothing", "cuda.syncthreads"),
]
LEFT_OVER = Mutation("left over", "total", "0")


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_it(fault, monkeypatch):
    load([DELTA], DELTA, fault, monkeypatch)
"""


def _dry_run(*files: Path) -> tuple[int, str]:
    """Exit status and text of a run of test files that applies faults, and runs no kernel.

    In a process of its own: the plugin changes how all tests load faults.
    """
    plugins = [f"-p{name}" for name in (_PLUGIN, "no:cacheprovider", "no:xdist")]
    options = ["-q", "-rN", "--tb=short", *plugins]
    switches = {"NUMFLASH_TEST_ALL": "1", "NUMFLASH_TEST_FULL": "0", "NUMBA_ENABLE_CUDASIM": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *map(str, files)],
        env=os.environ | switches,
        cwd=_TESTS.parent,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def test_every_fault_stands_in_the_sources():
    """Tests of the host, as this one, run no kernels."""
    files = [path for path in _TESTS.rglob("test_*.py") if _TESTS / "host" not in path.parents]
    status, text = _dry_run(*(path for path in files if _IMPORTS_FAULTS in path.read_text()))
    assert status == 0, text
    assert "skipped" in text, "no test has come to a kernel"


def test_a_stale_fault_is_named(tmp_path):
    (tmp_path / "test_stale.py").write_text(_STALE)
    status, text = _dry_run(tmp_path / "test_stale.py")
    assert status == 1 and "3 failed, 1 passed" in text
    of_delta = "AssertionError: numflash.kernels.shared.delta: "
    for said in (
        f"{of_delta}no more: 'total - of_no_row' stands 0 times in the source",
        f"{of_delta}in one place: 'total - of_rows.dlse' stands 1 times in the source",
        f"{of_delta}there is no cuda.syncthreads 0 of make_nothing in the source",
        "no test puts Mutation(name='left over', old='total', ",
    ):
        assert said in text
    assert text.count("no test puts") == 1
