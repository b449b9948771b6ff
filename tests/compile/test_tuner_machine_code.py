"""The tuner's reading of machine code, on kernels compiled for machines that are not here.

The counts are those that the kernels' docstrings and docs/decisions.md give.
"""

from functools import cache

import pytest

from numflash.configs import Traits, parse_config
from numflash.machine_code import sass
from numflash.machine_code.compiler import get_cubin
from numflash.problem.classes import ProblemClass
from numflash.runtime.devices import architecture
from tests.support.covering import some, thorough
from tuner import model
from tuner.model import counts, hopper
from tuner.model.machine_code import MachineCode, analyse
from tuner.records import ResourceUsage
from tuner.search.pool import examine
from tuner.space import machines
from tuner.space.configs import Space

pytestmark = pytest.mark.skipif(
    sass.find_disassembler() is None, reason=f"there is no disassembler; {sass.INSTALL_HINT}"
)

FORWARD = ("forward", "sm80-m128n64w4s1", "bfloat16-d128-dv128-vec", "sm_90a")


@cache
def machine_code(family: str, config: str, traits: str, arch: str) -> MachineCode:
    cubin = get_cubin(parse_config(family, config), Traits.parse(traits), architecture(arch))
    return analyse(sass.disassemble(cubin.code))


def test_forward_is_what_its_docstring_says():
    loop = machine_code(*FORWARD).main
    turn = loop.counts
    assert not loop.inner
    assert turn.matrix == 256
    # 32 rows a warp, 64 keys, two products of depth and width 128.
    assert turn.multiply_adds == 2 * 32 * 64 * 128
    assert turn.exponentials == turn.special == 64
    assert turn.shared == 80
    # 80 LDSM of 512 bytes; K and V, of which a warp copies a quarter.
    copied = 2 * 64 * 128 * 2 // 4
    assert turn.global_bytes == copied
    assert turn.shared_bytes == 80 * 512
    assert turn.conversions == 32
    assert turn.shuffles == 8
    assert turn.barriers == 2
    assert turn.ffma == 64 + 4
    # 64 FADD for the sum and the IMAD of addresses come on top; rescaling O does not.
    assert 128 <= turn.fma < 128 + 64
    # 64 FMNMX and 8 across lanes; the mask does not.
    assert 72 <= turn.alu < 72 + 150
    assert turn.issued < 900
    assert turn.local == 0


def test_mask_and_rescaling_are_rare():
    rare = machine_code(*FORWARD).main.rare
    # O is rescaled with 128 FMUL; the mask takes 192 comparisons and selections.
    assert rare.fma >= 128
    assert rare.alu >= 192
    assert rare.exponentials == 4
    assert rare.matrix == rare.shared == rare.global_bytes == 0


@thorough
def test_fused_backward_walks_in_the_inner_loop():
    code = machine_code("backward", "sm80-m32n128w8s2", "bfloat16-d128-dv128-vec", "sm_90a")
    (walk,) = code.loops
    assert code.main is walk.inner[0]
    turn = code.main.counts
    assert turn.matrix == 160
    # 104 LDSM, 8 LDS for lse and delta, 8 STS of dS.
    assert turn.shared == 120
    assert turn.exponentials == 16
    # dQ is loaded where it was not just begun.
    assert turn.global_loads == 4
    assert turn.barriers == 2


def test_portable_products_are_loops_of_their_own():
    code = machine_code("forward", "m64n64w4", "float32-d64-dv64-vec", "sm_90a")
    products = [loop.counts for loop in code.main.inner if loop.counts.ffma]
    # Four steps of depth: 4 rows and 8 columns a thread, of S and of O.
    assert [counts.ffma for counts in products] == [128, 128]
    # 12 loads of 16 bytes each.
    assert [counts.shared_bytes for counts in products] == [12 * 512, 12 * 512]
    assert code.main.counts.exponentials == 32 + 4
    assert code.main.rare.alu > 100
    copies = [loop for loop in code.main.inner if loop.counts.global_loads]
    assert len(copies) == 2


KERNELS = (
    FORWARD,
    ("backward", "sm80-m32n128w8s2", "bfloat16-d128-dv128-vec", "sm_90a"),
    ("forward", "m64n64w4", "float32-d64-dv64-vec", "sm_90a"),
)


@pytest.mark.parametrize(("family", "config", "traits", "arch"), some(KERNELS, every=2))
def test_formulas_agree_with_machine_code(family, config, traits, arch):
    code = machine_code(family, config, traits, arch)
    formula = counts.by_formula(parse_config(family, config), Traits.parse(traits))
    compiled = counts.complete(formula, code.main, code.outside)
    for kind in ("matrix", "multiply_adds", "ffma", "shuffles", "barriers"):
        assert getattr(formula.tile, kind) == pytest.approx(getattr(compiled.tile, kind), rel=0.01)
    for kind in ("exponentials", "conversions", "shared", "shared_bytes", "global_bytes"):
        assert getattr(formula.tile, kind) == pytest.approx(getattr(compiled.tile, kind), rel=0.15)
    for kind in ("issued", "fma", "alu"):
        assert getattr(formula.tile, kind) == pytest.approx(getattr(compiled.tile, kind), rel=0.25)


HOPPER = [
    ("sm90-m128n128w8s2-overlap-pingpong-persistent", "bfloat16-d128-dv128-vec"),
    ("sm90-m192n128w12s2", "float16-d64-dv64-vec"),
    ("sm90-m128n64w8s2-overlap-persistent", "bfloat16-d256-dv256-softcap-vec"),
]


@thorough
@pytest.mark.parametrize(("config", "traits"), HOPPER, ids=lambda text: text)
def test_formulas_of_warpgroups_agree_with_machine_code(config, traits):
    code = machine_code("forward", config, traits, "sm_90a")
    config, traits = parse_config("forward", config), Traits.parse(traits)
    compiled, formula = hopper.from_machine_code(code), hopper.by_formula(config, traits)
    for kind in ("matrix", "multiply_adds", "shuffles"):
        assert getattr(compiled.tile, kind) == getattr(formula.tile, kind)
    assert compiled.tile.special == pytest.approx(formula.tile.special, rel=0.05)
    for kind in ("issued", "fma", "alu", "conversions"):
        assert getattr(compiled.tile, kind) == pytest.approx(getattr(formula.tile, kind), rel=0.35)
    # The mask and the rescaling of O.
    assert compiled.rare.alu == pytest.approx(formula.rare.alu, rel=0.2)
    assert compiled.rare.fma >= formula.rare.fma
    # One tile of rows: no product beyond those of its tiles of keys.
    assert compiled.place.matrix == compiled.place.multiply_adds == 0
    assert 0.5 < compiled.place.issued / formula.place.issued < 2
    machine = machines.find("H100")
    problem = ProblemClass.parse(f"forward {traits} full q4096 k4096 bh64 g1")
    resources = ResourceUsage(168, 0, config.smem_bytes(traits), config.num_threads, 1, "threads")
    predicted = model.predict(machine, problem, config, resources, code)
    assert predicted.ms == pytest.approx(model.estimate(machine, problem, config).ms, rel=0.08)


@thorough
@pytest.mark.parametrize(
    ("config", "is_feasible"),
    [("sm90-m192n80w12s2-overlap", True), ("sm90-m192n96w12s2-overlap", False)],
)
def test_what_the_space_leaves_out_for_its_registers_spills(config, is_feasible):
    text = "bfloat16-d128-dv128-vec"
    problem = ProblemClass.parse(f"forward {text} full q4096 k4096 bh64 g1")
    space, config = Space(problem, machines.find("H100")), parse_config("forward", config)
    assert (space.failure(config) is None) == is_feasible
    examined = examine("forward", str(config), text, "sm_90a")
    assert (space.judge_resources(examined.resources) is None) == is_feasible
    if not is_feasible:
        assert "C7512" in examined.resources.warnings[0]


def test_prediction_from_machine_code_is_near_that_by_formula():
    machine = machines.find("H100")
    problem = ProblemClass.parse(f"forward {FORWARD[2]} causal q4096 k4096 bh64 g1")
    config = parse_config(*FORWARD[:2])
    resources = ResourceUsage(255, 0, 65536, 128, 2, "registers")
    predicted = model.predict(machine, problem, config, resources, machine_code(*FORWARD))
    estimated = model.estimate(machine, problem, config)
    assert predicted.ms == pytest.approx(estimated.ms, rel=0.05)
    assert predicted.ms != estimated.ms
