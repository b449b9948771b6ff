"""The tables of tuned configs that come with numflash."""

from pathlib import Path

import pytest

pytest.importorskip("optuna")

import numflash.shipped
from numflash import store
from numflash.devices import architecture
from numflash.dispatch import force
from numflash_tuner import machines, shipping

TABLES = store.read_shipped()
ENTRIES = [(device, entry) for device, entries in TABLES.items() for entry in entries]


def test_there_is_a_table_for_every_gpu_and_nothing_else():
    files = set(Path(numflash.shipped.__file__).parent.glob("*.json"))
    assert files == {shipping.path_of(name) for name in shipping.GPUS}
    assert {device.name for device in TABLES} == set(shipping.GPUS)


@pytest.mark.parametrize("name", shipping.GPUS)
def test_nothing_is_wrong_with_a_table(name):
    assert store.validate(shipping.path_of(name)) == []
    machine = machines.find(name)
    entries = TABLES[store.DeviceKey(machine.name, machine.arch, machine.num_sms)]
    families = {entry.problem.family for entry in entries}
    assert families >= {"forward", "backward-dkdv", "backward-dq", "combine"}
    for entry in entries:
        choice = force(
            entry.problem.family, entry.config, entry.problem.traits, architecture(machine.arch)
        )
        assert str(choice.config) == entry.config


def test_predictions_are_marked_and_beat_the_default_or_keep_it():
    for device, entry in ENTRIES:
        assert entry.origin == "predicted", device
        if entry.default_ms is not None and entry.config != entry.default_config:
            assert entry.time_ms < 0.951 * entry.default_ms
