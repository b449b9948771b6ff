"""The command line, run without compilers and in a folder of its own."""

import pytest

from tests.host.tuner.test_session import InstantPool
from tuner import cli
from tuner.search import session


@pytest.fixture(autouse=True)
def instant(tmp_path, monkeypatch):
    """No compilers, a cache and a working directory of the test's own."""
    monkeypatch.setattr(session, "CompilePool", InstantPool)
    monkeypatch.setattr(InstantPool, "spill_bytes", 0)
    monkeypatch.setenv("NUMFLASH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(capsys):
    """Runs the command line; (exit status, stdout, stderr)."""

    def run(*argv):
        try:
            status = cli.main([str(argument) for argument in argv])
        except SystemExit as error:
            status = error.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return status, out, err

    return run


@pytest.fixture
def refused(run):
    """Runs what must be refused; the only line that it writes."""

    def refused(*argv, status=2):
        found, out, err = run(*argv)
        assert (found, out) == (status, "")
        assert err.count("\n") == 1 and err.startswith("numflash-tune"), err
        return err

    return refused
