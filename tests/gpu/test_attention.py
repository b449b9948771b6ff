"""Every kernel on a GPU: forward and gradients within budget, at full size.

By default 16-bit inputs run on the tensor cores and float32 on the portable kernels. The other
kernels that a case can run on are forced: portable ones, tf32, Turing's instructions, splits. On
Hopper each config is forced in turn, and problems are large enough that a block of a persistent
kernel takes several tiles of rows.
"""

import pytest

import numflash
from bench.measuring import agreement
from bench.points.points import Point
from numflash.configs.wgmma import Sm90ForwardConfig
from numflash.problem.options import ARRAY_OPTIONS
from numflash.runtime.driver import limits_of_device
from numflash.runtime.views import numpy_dtype
from tests.support.attention_cases import GPU_CASES, SIM_CASES, SMALL_CONFIGS, on_tensor_cores
from tests.support.hopper_cases import HOPPER_CASES, on_hopper

_FORCED = {
    "portable": {
        "forward": "m64n32w4",
        "backward-dq": "m32n16w4",
        "backward-dkdv": "m16n32w4",
    },
    "turing": {
        "forward": "sm75-m64n32w4s1",
        "backward-dq": "sm75-m64n16w4s1",
        "backward-dkdv": "sm75-m16n64w4s1-apart",
    },
    "stages": {
        "forward": "sm80-m128n32w4s2",
        "backward-dq": "sm80-m64n32w4s3",
        "backward-dkdv": "sm80-m16n64w4s3",
    },
    "split": {"forward": "sm80-m64n32w4s1x7"},
    "fused": {"forward": "sm80-m64n32w4s1", "backward": "sm80-m64n64w4s1x3"},
}


def _forced():
    """(case, configs): every fifth case of a dtype that a set of configs is for."""
    sixteen_bit = on_tensor_cores([c for c in GPU_CASES if c.dtype != "float32"], "sm80")
    sets = {
        "portable": [c for c in GPU_CASES if c.dtype != "float32"],
        "turing": on_tensor_cores(GPU_CASES, "sm75"),
        "stages": [c for c in sixteen_bit if max(c.shape[5:]) <= 128],
        "split": sixteen_bit,
        "fused": [c for c in sixteen_bit if max(c.shape[5:]) <= 128],
        "tf32": on_tensor_cores([c for c in GPU_CASES if c.dtype == "float32"], "tf32"),
    }
    for name, configs in _FORCED.items():
        for case in sets[name][::5]:
            yield pytest.param(case, configs, id=f"{name}-{case}")
    for case in sets["tf32"][::3]:
        yield pytest.param(case, None, id=f"tf32-{case}")
    for i, case in enumerate(sixteen_bit[::7]):
        configs = SMALL_CONFIGS["sm80"][i % len(SMALL_CONFIGS["sm80"])]
        yield pytest.param(case, configs, id=f"small-{case}")


# Configs of Hopper's kernel and the largest head dim for each: shipped ones, switches turned.
_HOPPER = (
    ("m128n128w8s2-overlap-pingpong-persistent", 128),
    ("m128n128w8s2-overlap-persistent", 128),
    ("m128n128w8s2-pingpong-persistent", 128),
    ("m128n128w8s1-overlap-pingpong", 128),
    ("m128n96w8s3-overlap-pingpong", 128),
    ("m128n96w8s2x3-overlap-pingpong-persistent", 128),
    ("m192n128w12s2-persistent", 64),
    ("m192n128w12s2-overlap-pingpong-persistent", 64),
    ("m192n64w12s3-pingpong", 64),
    ("m64n64w4s2b2-overlap", 128),
    ("m64n128w4s2-unpacked-overlap-persistent", 128),
    ("m128n80w8s2-overlap-persistent", 192),
    ("m128n64w8s2-overlap-persistent", 256),
    ("m128n64w8s2-pingpong", 256),
    ("m64n64w4s2x2-overlap-persistent", 256),
    ("m128n128w8s2-c2-overlap-pingpong-persistent", 128),
    ("m128n80w8s2-c2-overlap-persistent", 256),
)


def hopper_cases() -> list:
    """(config, case): large cases, a sixth of them on each config, and all small ones in turn."""
    large = on_hopper([c for c in GPU_CASES if c.dtype != "float32" and c not in SIM_CASES])
    found = []
    for i, (text, columns) in enumerate(_HOPPER):
        fitting = [case for case in large if max(case.shape[5:]) <= columns]
        found += [(f"sm90-{text}", case) for case in fitting[i % 6 :: 6]]
    configs = [configs["forward"] for configs in SMALL_CONFIGS["sm90"]]
    small = on_hopper(SIM_CASES)
    found += [(configs[i % len(configs)], case) for i, case in enumerate(small)]
    ids: dict[str, tuple] = {}
    for config, case in [*found, *HOPPER_CASES]:
        # Cases of the same name differ in their sizes.
        sizes = "x".join(map(str, case.shape))
        ids[f"{config}:{case}-{sizes}"] = (config, case)
    return [pytest.param(*values, id=name) for name, values in ids.items()]


# More tiles of rows than 132 SMs, evenly and not; the longest against a sample of heads.
_HOPPER_POINTS = (
    Point("forward", "many tiles", "bfloat16", 4, 2048, 2048, 16, 16, 128, True),
    Point("forward", "many tiles", "float16", 3, 1111, 1111, 15, 5, 128, True),
    Point("forward", "many tiles", "bfloat16", 2, 3000, 1777, 33, 33, 64, False),
    Point("forward", "many tiles", "float16", 5, 1500, 1500, 9, 3, 64, True),
    Point("forward", "many tiles", "bfloat16", 2, 1500, 1500, 24, 24, 192, True),
    Point("forward", "many tiles", "float16", 2, 2048, 2048, 12, 12, 256, True),
    Point("forward", "long", "bfloat16", 1, 16384, 16384, 16, 16, 128, False),
    Point("forward", "long", "bfloat16", 1, 16384, 16384, 16, 16, 128, True),
    Point("forward", "long", "float16", 1, 16384, 16384, 32, 8, 64, True),
    Point("forward", "long", "bfloat16", 1, 16384, 16384, 8, 8, 256, True),
    Point("forward", "longest", "float16", 1, 65536, 65536, 2, 1, 128, True),
)


def _on_device(case):
    """The case's arrays as CuPy arrays with the same strides, and its options."""
    import cupy

    def upload(array):
        # A strided view: move what it is a view of, then take the same view of that.
        base = array if array.base is None else array.base
        while base.base is not None:
            base = base.base
        moved = cupy.asarray(base)
        offset = array.__array_interface__["data"][0] - base.__array_interface__["data"][0]
        memory = cupy.cuda.MemoryPointer(
            moved.data.mem, moved.data.ptr - moved.data.mem.ptr + offset
        )
        return cupy.ndarray(array.shape, array.dtype, memptr=memory, strides=array.strides)

    arrays = {name: upload(array) for name, array in case.arrays().items()}
    options = case.call_options()
    given = [name for name in ARRAY_OPTIONS if name in options]
    options |= {name: cupy.asarray(options[name]) for name in given}
    return arrays, options


@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_forward(case, poisoned_pool):
    arrays, options = _on_device(case)
    arrays.pop("dout")
    report = numflash.check(**arrays, **options)
    assert report.passed, f"\n{report}"


@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_gradients(case, poisoned_pool):
    arrays, options = _on_device(case)
    report = numflash.check(**arrays, **options)
    assert report.passed, f"\n{report}"


@pytest.mark.parametrize(("case", "configs"), list(_forced()))
def test_gradients_of_forced_kernels(case, configs, poisoned_pool):
    arrays, options = _on_device(case)
    try:
        report = numflash.check(**arrays, config=configs, **options)
    except numflash.UnsupportedError as error:
        pytest.skip(str(error))
    assert report.passed, f"\n{report}"


@pytest.fixture
def hopper():
    """Skip where there is no Hopper."""
    if limits_of_device(0).compute_capability != (9, 0):
        pytest.skip("needs a GPU of compute capability 9.0")


@pytest.mark.parametrize(("config", "case"), hopper_cases())
def test_forward_on_hopper(config, case, hopper, poisoned_pool):
    arrays, options = _on_device(case)
    arrays.pop("dout")
    report = numflash.check(**arrays, config=config, **options)
    assert report.passed, f"\n{report}"


def inputs_of(xp, point: Point) -> list:
    """q, k and v of a point, random."""
    rng, dtype = xp.random.default_rng(0), numpy_dtype(point.dtype)
    shapes = (
        (point.batch, point.seqlen_q, point.num_heads_q, point.head_dim),
        *[(point.batch, point.seqlen_k, point.num_heads_kv, point.head_dim)] * 2,
    )
    return [rng.standard_normal(shape, dtype="float32").astype(dtype) for shape in shapes]


def check_sample(xp, point: Point, q, k, v, out) -> None:
    """Raise AssertionError unless two heads of `out` are within their budget."""
    dtype = numpy_dtype(point.dtype)
    samples = agreement.make_samples(
        xp, point, lambda x: x.astype(dtype).astype("float32"), q, k, v
    )
    found = agreement.compare({"out": out}, samples)
    assert found["outcome"] == "checked", found


@pytest.mark.parametrize("point", _HOPPER_POINTS, ids=str)
def test_forward_on_hopper_of_many_tiles(point, hopper, poisoned_pool):
    import cupy

    q, k, v = inputs_of(cupy, point)
    chosen = numflash.explain_dispatch(q, k, v, causal=point.causal).forward.config
    assert isinstance(chosen, Sm90ForwardConfig)
    out = numflash.attention(q, k, v, causal=point.causal)
    assert not bool(cupy.isnan(out.astype("float32")).any())
    check_sample(cupy, point, q, k, v, out)
    # The scheduler and the order of warps change no bit.
    for _ in range(3):
        again = numflash.attention(q, k, v, causal=point.causal)
        assert bool((again.view("u1") == out.view("u1")).all())


def test_forward_on_hopper_in_a_graph(hopper):
    import cupy

    q, k, v = inputs_of(cupy, _HOPPER_POINTS[1])
    plan = numflash.plan(q, k, v, causal=True)
    plan.launch()
    expected = plan.out.copy()
    plan.out.fill(0)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        plan.launch(stream)
        graph = stream.end_capture()
        graph.launch()
        graph.launch()
    stream.synchronize()
    assert bool((plan.out == expected).all())


def test_forward_on_hopper_with_other_addresses(hopper):
    # More of them than tensor maps are remembered: each call must read its own arrays.
    import cupy

    point = Point("forward", "addresses", "float16", 1, 200, 200, 4, 4, 64, True)
    q, k, v = inputs_of(cupy, point)
    expected = numflash.attention(q, k, v, causal=True)
    for scale, scaled in enumerate([v * scale for scale in range(1, 81)], 1):
        out = numflash.attention(q, k, scaled, causal=True)
        assert bool((abs(out / scale - expected) < 5e-3).all())
