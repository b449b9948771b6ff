"""The example in each public docstring runs, and prints what it shows."""

import doctest

import pytest

import numflash
from numflash import reference

PUBLIC = {
    f"{module.__name__}.{name}": getattr(module, name)
    for module in (numflash, reference)
    for name in module.__all__
    if callable(getattr(module, name))
}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_name_has_an_example_that_runs(name):
    docstring = PUBLIC[name].__doc__
    test = doctest.DocTestParser().get_doctest(docstring, {}, name, None, None)
    assert "\n    Example:\n" in docstring and test.examples
    report: list[str] = []
    results = doctest.DocTestRunner(verbose=False).run(test, out=report.append)
    assert not results.failed, "".join(report)
