"""A machine that notes what is made and launched."""

import pytest

from tests.support.bad_calls import Machine


@pytest.fixture
def machine(monkeypatch):
    """A `Machine`."""
    return Machine(monkeypatch)
