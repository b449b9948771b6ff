"""The table of GPUs: names are understood, figures agree with what the makers publish."""

import pytest

from numflash.runtime.devices import ARCHITECTURES
from tuner.space import machines

# Dense TFLOP/s of float16 with float32 accumulators, by data sheet, and what share of that
# mma.sync is taken to reach.
PUBLISHED_TFLOPS = {
    "Tesla T4": (65, 1),
    "NVIDIA A100-SXM4-80GB": (312, 1),
    "NVIDIA A30": (165, 1),
    "NVIDIA A10": (125, 1),
    "NVIDIA GeForce RTX 2080 Ti": (53.8, 1),
    "NVIDIA GeForce RTX 3090": (71, 1),
    "NVIDIA L4": (121, 1),
    "NVIDIA L40S": (362, 1),
    "NVIDIA GeForce RTX 4090": (165.2, 1),
    "NVIDIA GeForce RTX 5090": (209.5, 1),
    "NVIDIA H100 80GB HBM3": (989.4, 0.625),
    "NVIDIA H100 PCIe": (756, 0.625),
    "NVIDIA H100 NVL": (835, 0.625),
    "NVIDIA H200": (989.4, 0.625),
    "NVIDIA B200": (2250, 0.25),
}
ASKED_FOR = (
    *("T4", "A10", "A30", "A100", "A100-40GB", "A100-80GB", "L4", "L40S"),
    *("H100", "H100-PCIe", "H100-SXM", "H100-NVL", "H200", "B200"),
    *("2080", "2080Ti", "3070", "3070Ti", "3080", "3080Ti", "3090", "3090Ti"),
    *("4070", "4080", "4090", "5070", "5080", "5090"),
)


@pytest.mark.parametrize("name", PUBLISHED_TFLOPS)
def test_rates_times_clock_are_the_published_peak(name):
    machine = machines.find(name)
    tflops = 2 * machine.mma_f16 * machine.num_sms * machine.clock_mhz / 1e6
    peak, share = PUBLISHED_TFLOPS[name]
    assert tflops == pytest.approx(share * peak, rel=0.02)


@pytest.mark.parametrize(
    ("name", "tflops"), [("H100", 989.4), ("H100 PCIe", 756), ("H200", 989.4), ("GH200", 989.4)]
)
def test_warpgroups_multiply_at_the_published_peak(name, tflops):
    machine = machines.find(name)
    found = 2 * machine.wgmma_f16 * machine.num_sms * machine.clock_mhz / 1e6
    assert found == pytest.approx(tflops, rel=0.02)
    assert machine.arch == "sm_90a" and machine.wgmma_f16 > machine.mma_f16


def test_only_hopper_has_products_of_warpgroups():
    having = {m.arch for m in map(machines.find, machines.names()) if m.wgmma_f16}
    assert having == {"sm_90a"}


@pytest.mark.parametrize("name", ASKED_FOR)
def test_all_gpus_of_the_issue_are_known(name):
    machine = machines.find(name)
    assert machine.name in machines.names()
    assert machine.limits.arch == machine.arch
    assert machine.source


@pytest.mark.parametrize("name", machines.names())
def test_every_row_is_sound(name):
    machine = machines.find(name)
    assert machine.name == name
    assert machine.arch in ARCHITECTURES
    assert 1000 < machine.clock_mhz < 3000
    assert 300 <= machine.memory_gbps <= 8000
    assert 4 * 2**20 <= machine.l2_bytes <= 128 * 2**20
    # An L2 that were slower than the memory behind it would be a slip.
    assert machine.l2_bytes_per_clock * machine.clock_mhz * 1e6 > machine.memory_gbps * 1e9
    assert (machine.mma_tf32 == 0) == (machine.arch == "sm_75")


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("NVIDIA A100", "NVIDIA A100-SXM4-80GB"),
        ("a100", "NVIDIA A100-SXM4-80GB"),
        ("nvidia a100-sxm4-40gb", "NVIDIA A100-SXM4-40GB"),
        ("A100 PCIe", "NVIDIA A100 80GB PCIe"),
        ("rtx 4090", "NVIDIA GeForce RTX 4090"),
        ("RTX4090", "NVIDIA GeForce RTX 4090"),
        ("4090", "NVIDIA GeForce RTX 4090"),
        ("geforce rtx 2080 ti", "NVIDIA GeForce RTX 2080 Ti"),
        ("t4", "Tesla T4"),
        ("NVIDIA T4", "Tesla T4"),
        ("h100", "NVIDIA H100 80GB HBM3"),
        ("H100 NVL", "NVIDIA H100 NVL"),
        (" h200 ", "NVIDIA H200"),
    ],
)
def test_spellings(spelling, name):
    assert machines.find(spelling).name == name


def test_no_spelling_stands_for_two_gpus():
    rows = machines._table()["machines"]
    spellings = [machines._key(s) for r in rows for s in {r["name"], *r.get("aliases", ())}]
    # An alias may repeat its own machine's key, as "NVIDIA T4" does.
    owners = {}
    for row in rows:
        for spelling in (row["name"], *row.get("aliases", ())):
            assert owners.setdefault(machines._key(spelling), row["name"]) == row["name"]
    assert set(owners) == set(spellings)


@pytest.mark.parametrize(
    ("spelling", "name", "like"),
    [
        ("sm_89", "sm_89", "NVIDIA GeForce RTX 4090"),
        ("89", "sm_89", "NVIDIA GeForce RTX 4090"),
        ("sm_90", "sm_90", "NVIDIA H100 80GB HBM3"),
        ("SM90a", "sm_90", "NVIDIA H100 80GB HBM3"),
        ("sm_80", "sm_80", "NVIDIA A100-SXM4-80GB"),
        ("100", "sm_100", "NVIDIA B200"),
    ],
)
def test_an_architecture_has_the_figures_of_its_representative(spelling, name, like):
    machine, whole = machines.find(spelling), machines.find(like)
    assert machine.name == name
    assert (machine.arch, machine.num_sms, machine.mma_f16) == (
        whole.arch,
        whole.num_sms,
        whole.mma_f16,
    )
    assert like in machine.source


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("NVIDIA A1000", "NVIDIA A100"),
        ("RTX 4095", "NVIDIA GeForce RTX 4090"),
        ("H300", "NVIDIA H[12]00"),
        ("Voodoo", r"numflash-tune --list-devices"),
        ("", r"numflash-tune --list-devices"),
        ("sm_70", "sm_75, sm_80"),
        ("sm_88", "no GPU of sm_88"),
    ],
)
def test_unknown_devices_are_refused_with_the_nearest_names(wrong, said):
    with pytest.raises(ValueError, match=said):
        machines.find(wrong)


def test_a_gpu_that_is_not_in_the_table_has_its_architectures_rates():
    mobile = machines.of_device(
        "NVIDIA GeForce RTX 4060 Laptop GPU", "sm_89", 24, 2370, 256, 32 * 2**20
    )
    assert (mobile.name, mobile.num_sms, mobile.memory_gbps, mobile.l2_bytes) == (
        "NVIDIA GeForce RTX 4060 Laptop GPU",
        24,
        256,
        32 * 2**20,
    )
    desktop = machines.find("4090")
    assert mobile.mma_f16 == desktop.mma_f16
    assert mobile.l2_bytes_per_clock / 24 == desktop.l2_bytes_per_clock / 128
    workstation = machines.of_device("NVIDIA RTX 6000 Ada", "sm_89", 142, 2505, 960, 96 * 2**20)
    assert workstation.mma_f16 == machines.find("L40S").mma_f16 == 2 * desktop.mma_f16


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_has_rates(arch):
    machine = machines.of_device("a GPU", arch, 10, 1500, 500, 2**22)
    assert machine.arch == arch
    assert machine.mma_f16 > 0 < machine.fp32_lanes
    with pytest.raises(ValueError, match="architecture must be one of"):
        machines.of_device("a GPU", "sm_70", 10, 1500, 500, 2**22)
