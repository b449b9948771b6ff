"""The examples of public docstrings of front ends run, where their framework is there."""

import doctest
import importlib

import pytest

# What a front end imports.
FRAMEWORKS = {
    "numflash.torch": "torch",
    "numflash.flash_attn": "torch",
    "numflash.transformers": "transformers",
    "numflash.jax": "jax",
}
# Names of other libraries' functions, which their documents explain.
OF_OTHERS = {"numflash.flash_attn"}


@pytest.mark.parametrize("door", FRAMEWORKS)
def test_public_names_have_examples_that_run(door):
    pytest.importorskip(FRAMEWORKS[door], reason=f"needs {FRAMEWORKS[door]}")
    module = importlib.import_module(door)
    for name in module.__all__:
        value = getattr(module, name)
        if not callable(value):
            continue
        test = doctest.DocTestParser().get_doctest(value.__doc__, {}, f"{door}.{name}", None, None)
        assert test.examples or door in OF_OTHERS, name
        report: list[str] = []
        results = doctest.DocTestRunner(verbose=False).run(test, out=report.append)
        assert not results.failed, "".join(report)
