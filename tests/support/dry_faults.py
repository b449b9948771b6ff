"""A plugin of pytest with which tests put their faults into sources, and no kernel runs.

All rows of all tables do. A test ends, skipped, where it would run a kernel. It fails where its
fault does not stand in the module for which it is meant, and so does the run where a fault is made
that no test comes to.
"""

import importlib

import pytest

from numflash.simulator.engine import Block
from tests.support import faults

_made, _applied = set(), set()
_events = faults.events


def _apply(modules, faulty, fault, monkeypatch):
    """For `faults.load`: puts the fault into its source, and gives the module as it is."""
    try:
        fault.apply(faults.source_of(faulty))
    except AssertionError as error:
        raise AssertionError(f"{faulty}: {error}") from None
    return importlib.import_module(list(modules)[-1])


def _found(source, called, kind=faults.Dropped):
    """For `faults.events`: what is read from a source stands in it; tests need not want it."""
    events = _events(source, called, kind)
    _made.difference_update(events)
    return events


def _record(kind):
    make, apply = kind.__init__, kind.apply

    def made(self, *args, **kwargs):
        make(self, *args, **kwargs)
        _made.add(self)

    def applied(self, source):
        _applied.add(self)
        return apply(self, source)

    kind.__init__, kind.apply = made, applied


def _skip(*args, **kwargs):
    pytest.skip("no kernel runs")


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(items):
    """Keep the rows that `conftest` leaves out."""
    collected = list(items)
    yield
    items[:] = collected


def pytest_sessionfinish(session):
    """Fail where a fault that was made, and not read from a source, has not been applied."""
    for fault in sorted(_made - _applied, key=repr):
        print(f"\nno test puts {fault!r} into a source before it runs a kernel")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


_record(faults.Mutation)
_record(faults.Event)
faults.load, faults.events, Block.run = _apply, _found, _skip
