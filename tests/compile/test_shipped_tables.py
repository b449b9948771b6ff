"""Configs of the shipped tables, where not the defaults, stay in registers on every GPU."""

import pytest

from numflash.configs import parse_config
from numflash.machine_code.report import inspect_kernel
from numflash.runtime.devices import architecture
from numflash.selection import store
from tests.support.covering import some


def _kernels():
    """Each machine code that a table prefers to the default, once for each architecture."""
    found = {}
    for device, entries in store.read_shipped().items():
        for entry in entries:
            if entry.config != entry.default_config:
                config = parse_config(entry.problem.family, entry.config)
                code = getattr(config, "compiled", config)
                found[entry.problem.family, str(code), entry.problem.traits, device.arch] = None
    return list(found)


@pytest.mark.parametrize(
    ("family", "config", "traits", "arch"), some(_kernels(), every=7), ids=lambda value: str(value)
)
def test_no_kernel_of_a_table_has_a_fault(family, config, traits, arch):
    report = inspect_kernel(parse_config(family, config), traits, architecture(arch))
    assert report.faults == ()
