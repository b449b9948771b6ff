"""The attention problems that every kernel must solve: small for the simulator, large for a GPU.

One table for both. A case names its sizes, its options and what is special about its inputs.
"""

from dataclasses import dataclass, field, replace

import numpy as np

from numflash.runtime.views import numpy_dtype

# Small configs for each implementation, so that small problems have several tiles in both
# directions. Those of the tensor cores go round: one or two rows of products a warp, one to three
# stages, one or two warps, keys split or not, gradients by one kernel, by two or by three.
SMALL_CONFIGS = {
    "portable": (
        {"forward": "m16n16w2", "backward-dq": "m16n16w2", "backward-dkdv": "m16n16w2"},
        {"forward": "m8n8w2", "backward-dq": "m8n16w2", "backward-dkdv": "m8n8w2"},
        {"forward": "m16n8w2", "backward-dq": "m8n8w1", "backward-dkdv": "m16n8w1"},
    ),
    "sm80": (
        {
            "forward": "sm80-m16n16w1s1",
            "backward-dq": "sm80-m32n16w2s2",
            "backward-dkdv": "sm80-m16n16w1s1",
        },
        {
            "forward": "sm80-m32n16w2s2",
            "backward-dq": "sm80-m16n16w1s1",
            "backward-dkdv": "sm80-m16n32w2s2",
        },
        {
            "forward": "sm80-m32n16w1s1x2",
            "combine": "w2",
            "backward-dq": "sm80-m32n16w1s2",
            "backward-dkdv": "sm80-m16n32w1s3-apart",
        },
        {
            "forward": "sm80-m16n16w1s3x3",
            "combine": "w2",
            "backward-dq": "sm80-m16n32w1s3",
            "backward-dkdv": "sm80-m16n16w1s2",
        },
        {"forward": "sm80-m32n32w2s1", "backward": "sm80-m16n16w1s2x2"},
        {"forward": "sm80-m16n16w1s2", "backward": "sm80-m32n32w2s1x3"},
    ),
    "sm75": (
        {
            "forward": "sm75-m32n16w2s1",
            "backward-dq": "sm75-m16n16w1s1",
            "backward-dkdv": "sm75-m16n16w1s1-apart",
        },
        {
            "forward": "sm75-m16n16w1s1x2",
            "combine": "w2",
            "backward-dq": "sm75-m32n16w1s1",
            "backward-dkdv": "sm75-m16n32w2s1",
        },
        {"forward": "sm75-m16n16w1s1", "backward": "sm75-m16n16w1s1x2"},
    ),
}
SMALL_CONFIGS["tf32"] = SMALL_CONFIGS["sm80"][:4]
# Hopper's have 64 rows at least. An odd number of them: dtypes of the cases take turns by twos.
SMALL_CONFIGS["sm90"] = tuple(
    {"forward": f"sm90-{text}"}
    for text in (
        "m64n32w4s2-overlap-persistent",
        "m64n32w4s1",
        "m64n16w4s3-v2-overlap",
        "m64n32w4s1x2-overlap",
        "m64n64w4s2-persistent",
        "m64n16w4s2x3",
        "m64n32w4s3b2",
        "m64n48w4s1-overlap-persistent",
        "m128n32w8s2-overlap-pingpong",
    )
)
# The same of the forward on 8-bit floats, whose tiles of keys are at least 32 or 64.
FP8_CONFIGS = (
    "fp8-sm89-m16n64w1s1",
    "fp8-sm80-m16n32w1s1",
    "fp8-sm89-m32n64w2s2",
    "fp8-sm89-m16n32w1s1-half",
    "fp8-sm75-m32n32w2s1",
    "fp8-sm89-m32n64w1s2x2-packed",
    "fp8-sm80-m32n32w1s1x3",
    "fp8-sm75-m16n64w1s1-packed",
)


@dataclass(frozen=True)
class AttentionCase:
    """One attention problem.

    Attributes:
        name: the test's id.
        shape: batch, seqlen_q, seqlen_k, num_heads_q, num_heads_kv, head_dim, head_dim_v.
        dtype: of q, k, v.
        inputs: "normal"; "large" (scores of about +-1e4); "equal" (all scores of a row are equal,
            so every key is the maximum); "strided" (slices of larger arrays full of NaN).
        options: of `numflash.attention`; arrays, as alibi_slopes, are given as their shape.
    """

    name: str
    shape: tuple[int, int, int, int, int, int, int]
    dtype: str = "float32"
    inputs: str = "normal"
    options: dict = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.name}-{self.dtype}"

    def arrays(self) -> dict[str, np.ndarray]:
        """q, k, v and dout, in the layout of the options."""
        batch, seqlen_q, seqlen_k, heads_q, heads_kv, head_dim, head_dim_v = self.shape
        rng = np.random.default_rng(sum(self.name.encode()))
        shapes = {
            "q": (batch, seqlen_q, heads_q, head_dim),
            "k": (batch, seqlen_k, heads_kv, head_dim),
            "v": (batch, seqlen_k, heads_kv, head_dim_v),
            "dout": (batch, seqlen_q, heads_q, head_dim_v),
        }
        values = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
        if self.inputs == "large":
            # Standard deviation of a score: 1e4 / 3, so that the largest are around 1e4.
            factor = (1e4 / 3) ** 0.5
            values["q"] *= factor
            values["k"] *= factor
        if self.inputs == "equal":
            values["k"][:] = values["k"][:, :1]
        arrays = {name: x.astype(numpy_dtype(self.dtype)) for name, x in values.items()}
        if self.options.get("layout") == "bhsd":
            arrays = {n: np.ascontiguousarray(x.swapaxes(1, 2)) for n, x in arrays.items()}
        if self.inputs == "strided":
            arrays = {name: _amid_nan(x) for name, x in arrays.items()}
        return arrays

    def call_options(self) -> dict:
        """The options with arrays in place of shapes."""
        options = dict(self.options)
        for name, value_of in _ARRAYS.items():
            if name in options:
                shape = options[name]
                values = value_of(np.arange(np.prod(shape))).reshape(shape)
                options[name] = values.astype(np.float32)
        return options


# The i-th element of options that are arrays.
_ARRAYS = {
    "alibi_slopes": lambda i: 2.0 ** -(i + 1),
    # One far below the scores, others near and above them.
    "sinks": lambda i: 3.0 * i - 2.0,
}


def _amid_nan(x: np.ndarray) -> np.ndarray:
    """The same values as a view into a larger array of NaN: gaps along every axis but the last."""
    batch, seqlen, heads, head_dim = x.shape
    whole = np.full((batch + 1, 2 * seqlen + 1, heads + 1, head_dim + 16), np.nan, x.dtype)
    view = whole[1:, 1 : 2 * seqlen + 1 : 2, :heads, 8 : 8 + head_dim]
    view[...] = x
    return view


def _masks(shape, **more):
    """Every mask on one shape."""
    kinds = {
        "full": {},
        "causal": {"causal": True},
        "causal-top-left": {"causal": True, "causal_align": "top_left"},
        "window": {"window_size": (9, 4)},
        "causal-shift": {"causal": True, "shift": -5},
        "window-shift": {"window_size": (3, 9), "shift": 7, "causal_align": "top_left"},
        "window-top-left": {"window_size": (3, 17), "causal_align": "top_left"},
        "causal-window": {"causal": True, "window_size": (12, None)},
    }
    return {name: (shape, {**options, **more}) for name, options in kinds.items()}


_FORMS = ("square-", "tall-", "wide-")


def _small() -> list[AttentionCase]:
    cases = []
    square, tall, wide = (
        (1, 33, 33, 1, 1, 16, 16),
        (1, 40, 19, 1, 1, 16, 16),
        (1, 17, 40, 1, 1, 32, 32),
    )
    for form, shape in (("square", square), ("tall", tall), ("wide", wide)):
        for mask, (sizes, options) in _masks(shape).items():
            cases.append(AttentionCase(f"{form}-{mask}", sizes, options=options))
    for dtype in ("float16", "bfloat16"):
        cases += [
            AttentionCase("causal", (1, 17, 37, 2, 1, 32, 32), dtype, options={"causal": True}),
            AttentionCase("odd-dims", (1, 19, 33, 1, 1, 33, 17), dtype),
            AttentionCase("large", (1, 17, 33, 1, 1, 32, 32), dtype, inputs="large"),
            AttentionCase("strided", (1, 17, 20, 2, 2, 16, 24), dtype, inputs="strided"),
        ]
    cases += [
        AttentionCase("one-token", (1, 1, 1, 1, 1, 8, 8)),
        AttentionCase("one-query", (2, 1, 33, 2, 1, 32, 32), options={"causal": True}),
        AttentionCase("one-key", (1, 33, 1, 1, 1, 32, 32)),
        AttentionCase("67", (1, 67, 67, 1, 1, 8, 8), options={"window_size": (20, 0)}),
        AttentionCase("131", (1, 5, 131, 1, 1, 8, 8)),
        AttentionCase("131-causal-tall", (1, 131, 9, 1, 1, 8, 8), options={"causal": True}),
        AttentionCase("head-dim-1", (1, 18, 18, 1, 1, 1, 1)),
        AttentionCase("head-dim-v-wider", (1, 18, 18, 1, 1, 24, 72)),
        AttentionCase("head-dim-v-narrower", (1, 18, 18, 1, 1, 72, 24)),
        AttentionCase("head-dim-odd", (1, 18, 18, 1, 1, 45, 45)),
        AttentionCase("groups-of-3", (1, 9, 18, 6, 2, 16, 16), options={"causal": True}),
        AttentionCase("large", (1, 17, 33, 1, 1, 32, 32), inputs="large"),
        AttentionCase("equal", (1, 17, 33, 1, 1, 16, 16), inputs="equal"),
        AttentionCase("strided", (2, 9, 20, 2, 1, 16, 16), inputs="strided"),
        AttentionCase("strided-odd", (1, 17, 20, 2, 1, 15, 15), inputs="strided"),
        AttentionCase("bhsd", (2, 9, 20, 2, 2, 16, 24), options={"layout": "bhsd"}),
        AttentionCase(
            "negative-scale", (1, 17, 33, 1, 1, 16, 16), options={"softmax_scale": -0.4}
        ),
        AttentionCase("zero-scale", (1, 17, 33, 1, 1, 16, 16), options={"softmax_scale": 0}),
        AttentionCase("softcap", (1, 17, 20, 2, 1, 16, 16), options={"softcap": 1.5}),
        AttentionCase(
            "softcap-causal", (1, 17, 33, 1, 1, 16, 16), options={"softcap": 2.0, "causal": True}
        ),
        AttentionCase("alibi", (1, 17, 20, 2, 1, 16, 16), options={"alibi_slopes": (2,)}),
        AttentionCase(
            "alibi-per-batch",
            (2, 9, 33, 2, 2, 16, 16),
            options={"alibi_slopes": (2, 2), "causal": True},
        ),
        AttentionCase(
            "everything",
            (2, 9, 37, 4, 2, 20, 28),
            "float16",
            "strided",
            {
                "softcap": 2.0,
                "alibi_slopes": (4,),
                "causal": True,
                "window_size": (15, 3),
                "softmax_scale": 0.3,
                "causal_align": "top_left",
            },
        ),
        # With a causal mask the first 21 queries see no key: their lse is the sink.
        AttentionCase(
            "sinks-tall", (1, 40, 19, 2, 1, 16, 16), options={"sinks": (2,), "causal": True}
        ),
        AttentionCase("sinks", (1, 9, 33, 2, 1, 16, 24), "float16", options={"sinks": (2,)}),
        AttentionCase(
            "sinks-large", (1, 9, 20, 3, 1, 16, 16), "float32", "large", {"sinks": (3,)}
        ),
        AttentionCase(
            "sinks-softcap-alibi",
            (1, 17, 37, 2, 2, 16, 16),
            "bfloat16",
            "strided",
            {"sinks": (2,), "softcap": 2.0, "alibi_slopes": (2,), "window_size": (9, 4)},
        ),
        AttentionCase(
            "dropout", (2, 33, 40, 2, 1, 32, 32), "float16", options={"dropout_p": 0.3, "seed": 7}
        ),
        # With a causal mask the first 29 queries see no key.
        AttentionCase(
            "dropout-tall",
            (1, 50, 21, 2, 1, 32, 32),
            options={"dropout_p": 0.5, "seed": -1, "causal": True},
        ),
        AttentionCase(
            "dropout-everything",
            (1, 21, 37, 4, 2, 20, 28),
            "bfloat16",
            "strided",
            {
                "dropout_p": 0.1,
                "seed": 2**40 + 1,
                "sinks": (4,),
                "softcap": 2.0,
                "alibi_slopes": (4,),
                "window_size": (15, 3),
                "causal_align": "top_left",
            },
        ),
    ]
    return cases


def _large() -> list[AttentionCase]:
    cases = []
    for dtype in ("float16", "bfloat16", "float32"):
        for head_dim in (32, 64, 96, 128, 192, 256):
            shape = (2, 257, 513, 4, 2, head_dim, head_dim)
            for mask, (sizes, options) in _masks(shape).items():
                cases.append(AttentionCase(f"d{head_dim}-{mask}", sizes, dtype, options=options))
        cases += [
            AttentionCase("tall", (1, 1025, 113, 2, 1, 64, 64), dtype, options={"causal": True}),
            AttentionCase("1000", (1, 1000, 1000, 2, 2, 80, 80), dtype, options={"causal": True}),
            AttentionCase("2-pow", (1, 2048, 2048, 4, 4, 64, 64), dtype, options={"causal": True}),
            AttentionCase("192-128", (1, 333, 333, 4, 4, 192, 128), dtype),
            AttentionCase("odd-dims", (2, 113, 257, 3, 1, 45, 77), dtype),
            AttentionCase("large", (1, 257, 257, 2, 2, 64, 64), dtype, inputs="large"),
            AttentionCase("equal", (1, 257, 257, 2, 2, 64, 64), dtype, inputs="equal"),
            AttentionCase("strided", (2, 257, 130, 4, 2, 64, 128), dtype, inputs="strided"),
            AttentionCase("softcap", (1, 513, 257, 2, 1, 64, 64), dtype, options={"softcap": 1.5}),
            AttentionCase(
                "alibi",
                (2, 257, 257, 4, 4, 64, 64),
                dtype,
                options={"alibi_slopes": (2, 4), "causal": True},
            ),
            AttentionCase("groups-of-8", (1, 300, 300, 16, 2, 128, 128), dtype),
            AttentionCase(
                "sinks",
                (2, 300, 513, 8, 2, 64, 64),
                dtype,
                options={"sinks": (8,), "causal": True},
            ),
            AttentionCase(
                "dropout",
                (2, 300, 513, 8, 2, 64, 64),
                dtype,
                options={"dropout_p": 0.2, "seed": 2**63, "causal": True},
            ),
        ]
    return [*cases, *_small()]


def halved(case: AttentionCase) -> AttentionCase:
    """The case with half as many tokens: as many tiles of half the size."""
    batch, seqlen_q, seqlen_k, *rest = case.shape
    return replace(case, shape=(batch, -(-seqlen_q // 2), -(-seqlen_k // 2), *rest))


def is_of_masks(case: AttentionCase) -> bool:
    """Whether a small case is there for its mask: it is one of a form for each mask."""
    return case.name.startswith(_FORMS)


def masks_of(case: AttentionCase) -> tuple[str, str]:
    """(form, mask) of such a case."""
    form, _, mask = case.name.partition("-")
    return form, mask


def on_tensor_cores(cases: list[AttentionCase], implementation: str) -> list[AttentionCase]:
    """The cases that "sm80", "sm75" or "tf32" kernels can run, in a dtype that they have."""
    dtypes = {"sm80": ("bfloat16", "float16"), "sm75": ("float16",), "tf32": ("float32",)}
    moved = []
    for i, case in enumerate(cases):
        choices = dtypes[implementation]
        dtype = case.dtype if case.dtype in choices else choices[i % len(choices)]
        options = case.options
        if implementation == "tf32":
            options = {**options, "precision": "tf32"}
        # A scale that is not positive is left to the portable kernels.
        if options.get("softmax_scale", 1) > 0:
            moved.append(replace(case, dtype=dtype, options=options))
    return moved


def on_fp8(cases: list[AttentionCase]) -> list[AttentionCase]:
    """The cases that kernels for 8-bit floats can run, in 16 bits, and some with more keys."""
    more = [
        AttentionCase("150-keys", (1, 20, 150, 2, 1, 64, 64), options={"causal": True}),
        AttentionCase(
            "130-keys-window", (1, 9, 130, 1, 1, 32, 96), options={"window_size": (90, 0)}
        ),
        AttentionCase("decode-130", (1, 1, 130, 4, 2, 64, 64)),
        AttentionCase("equal-150", (1, 9, 150, 1, 1, 32, 32), inputs="equal"),
        AttentionCase("large-150", (1, 9, 150, 2, 1, 64, 64), inputs="large"),
        AttentionCase("d128-100", (1, 17, 100, 1, 1, 128, 128), options={"causal": True}),
        AttentionCase("d80-48", (1, 17, 70, 1, 1, 80, 48)),
        AttentionCase("d192-256", (1, 9, 70, 1, 1, 192, 256)),
    ]
    cases = [case for case in cases if "dropout_p" not in case.options]
    return on_tensor_cores([*cases, *more], "sm80")


SIM_CASES = _small()
GPU_CASES = _large()
