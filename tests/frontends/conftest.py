"""Fixtures of the tests of front ends."""

import pytest

from numflash.calls.launch import Launcher
from tests.support.small_kernels import prefer_small_kernels


class Launched(list):
    """What ran since it was last cleared, in order: "forward sm80-m16n16w1s2" and the like."""

    @property
    def families(self) -> list[str]:
        """Of these the families: "forward", "backward-dkdv", "rotary", ..."""
        return [each.partition(" ")[0] for each in self]

    def take(self) -> list[str]:
        """The families, after which the list is empty."""
        families = self.families
        self.clear()
        return families


@pytest.fixture
def launched(monkeypatch):
    """The kernels that numflash launches in this test: a front end that falls back shows here."""
    launched, bind = Launched(), Launcher.bind

    def recorded(self, operands):
        launch, name = bind(self, operands), f"{self._config.family} {self._config}"

        def run(stream):
            launched.append(name)
            return launch(stream)

        return run

    monkeypatch.setattr(Launcher, "bind", recorded)
    return launched


@pytest.fixture(autouse=True)
def small_kernels(request, monkeypatch):
    """Where a test asks for no config small ones run, unless it takes `shipped_kernels`."""
    if "shipped_kernels" not in request.fixturenames:
        prefer_small_kernels(monkeypatch)


@pytest.fixture
def shipped_kernels():
    """For tests of what runs by itself: the kernels that are shipped."""
