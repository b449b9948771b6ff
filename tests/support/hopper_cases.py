"""The attention problems of Hopper's forward: those of all kernels, and some for its tiles."""

from dataclasses import replace

from tests.support.attention_cases import AttentionCase, on_tensor_cores


def on_hopper(cases: list[AttentionCase]) -> list[AttentionCase]:
    """The cases that Hopper's forward can run: rows of multiples of 16 bytes, 16-bit elements."""
    moved = []
    for case in on_tensor_cores(cases, "sm80"):
        head_dims = (-(-head_dim // 8) * 8 for head_dim in case.shape[5:])
        moved.append(replace(case, shape=(*case.shape[:5], *head_dims)))
    return moved


def _hopper() -> tuple[tuple[str, AttentionCase], ...]:
    """(config, case): several tiles of rows and of keys in Hopper's larger tiles."""
    table = (
        # name, config, shape, dtype, inputs, options
        (
            "causal",
            "m128n32w8s2-overlap-pingpong-persistent",
            (1, 140, 100, 1, 1, 64, 64),
            "float16",
            "normal",
            {"causal": True},
        ),
        (
            "three-groups",
            "m192n64w12s1-pingpong-persistent",
            (1, 200, 130, 1, 1, 64, 64),
            "bfloat16",
            "normal",
            {"window_size": (40, 90), "causal_align": "top_left"},
        ),
        (
            "three-groups-overlap",
            "m192n32w12s3-overlap-pingpong",
            (1, 150, 97, 1, 1, 32, 64),
            "float16",
            "normal",
            {"causal": True, "causal_align": "top_left"},
        ),
        (
            "stages-of-v",
            "m128n16w8s2-v3-overlap-pingpong-persistent",
            (1, 140, 110, 1, 1, 64, 64),
            "bfloat16",
            "normal",
            {"causal": True},
        ),
        (
            "one-stage",
            "m128n128w8s1-overlap",
            (1, 70, 300, 1, 1, 128, 128),
            "bfloat16",
            "normal",
            {"causal": True},
        ),
        (
            "192-128",
            "m64n96w4s2-overlap-persistent",
            (1, 40, 200, 1, 1, 192, 128),
            "float16",
            "normal",
            {},
        ),
        # Results take the place of Q, which the next tile of rows needs.
        (
            "256-shared",
            "m64n96w4s2-overlap-persistent",
            (1, 70, 130, 1, 1, 256, 256),
            "bfloat16",
            "normal",
            {"causal": True},
        ),
        (
            "groups-of-8",
            "m128n64w8s2-packed-pingpong",
            (1, 17, 100, 8, 1, 96, 96),
            "bfloat16",
            "normal",
            {"causal": True},
        ),
        (
            "decode",
            "m64n32w4s2x2-packed-overlap-persistent",
            (2, 1, 100, 8, 2, 64, 64),
            "float16",
            "normal",
            {},
        ),
        (
            "unpacked",
            "m64n32w4s2-h2-unpacked-persistent",
            (1, 40, 70, 4, 2, 32, 40),
            "bfloat16",
            "strided",
            {"window_size": (30, 5)},
        ),
        (
            "splits-of-nothing",
            "m128n32w8s3x3-overlap-pingpong",
            (1, 130, 90, 1, 1, 64, 64),
            "float16",
            "normal",
            {"window_size": (20, 0)},
        ),
        # Of rows that see no key there is a tile full, and a part of one.
        (
            "empty-rows",
            "m64n32w4s2-overlap-persistent",
            (1, 230, 40, 1, 1, 64, 64),
            "bfloat16",
            "normal",
            {"causal": True},
        ),
        (
            "empty-rows-last",
            "m128n32w8s2-r232-overlap-pingpong-persistent",
            (1, 270, 40, 1, 1, 64, 64),
            "float16",
            "normal",
            {"window_size": (20, 0), "causal_align": "top_left"},
        ),
        (
            "everything",
            "m128n64w8s2-overlap-pingpong-persistent",
            (1, 130, 90, 2, 2, 64, 64),
            "bfloat16",
            "normal",
            {
                "softcap": 2.0,
                "alibi_slopes": (2,),
                "window_size": (60, 20),
                "softmax_scale": 0.3,
                "causal_align": "top_left",
            },
        ),
        (
            "dropout",
            "m128n64w8s2-overlap-pingpong-persistent",
            (1, 130, 90, 2, 1, 64, 64),
            "float16",
            "normal",
            {"dropout_p": 0.4, "seed": 11, "causal": True},
        ),
        (
            "dropout-splits",
            "m64n32w4s2x3-overlap",
            (2, 70, 130, 1, 1, 32, 64),
            "bfloat16",
            "normal",
            {"dropout_p": 0.2, "seed": 12, "window_size": (60, 20)},
        ),
        (
            "registers-fixed",
            "m64n32w4s2-overlap-persistent-fixed",
            (1, 100, 90, 1, 1, 64, 64),
            "bfloat16",
            "normal",
            {"causal": True},
        ),
        (
            "l2-128",
            "m64n32w4s2-l128-overlap",
            (1, 70, 90, 1, 1, 64, 64),
            "float16",
            "normal",
            {"causal": True},
        ),
        # Clusters of two blocks: an odd number of tiles, and one tile, of which a block has none.
        (
            "clusters",
            "m64n32w4s2-c2-overlap-persistent",
            (1, 300, 100, 1, 1, 64, 64),
            "bfloat16",
            "normal",
            {},
        ),
        (
            "clusters-one-tile",
            "m64n32w4s2-c2-overlap",
            (1, 33, 70, 1, 1, 128, 128),
            "float16",
            "normal",
            {"causal": True},
        ),
        (
            "clusters-turns",
            "m128n32w8s2-v3-c2-overlap-pingpong-persistent",
            (1, 270, 100, 1, 1, 128, 128),
            "bfloat16",
            "normal",
            {"window_size": (60, 20), "causal_align": "top_left"},
        ),
        (
            "clusters-256",
            "m64n48w4s1-c2-persistent",
            (1, 130, 70, 1, 1, 256, 256),
            "bfloat16",
            "normal",
            {"causal": True},
        ),
        (
            "clusters-packed",
            "m64n64w4s2-packed-c2-persistent",
            (1, 17, 100, 8, 1, 96, 96),
            "float16",
            "normal",
            {"causal": True},
        ),
        (
            "clusters-splits",
            "m64n32w4s2x3-c2-overlap",
            (2, 150, 130, 1, 1, 64, 128),
            "float16",
            "normal",
            {"window_size": (20, 0)},
        ),
        (
            "clusters-everything",
            "m64n32w4s2-h2-unpacked-c2-overlap-persistent",
            (1, 200, 90, 4, 2, 64, 64),
            "bfloat16",
            "strided",
            {
                "softcap": 2.0,
                "alibi_slopes": (4,),
                "sinks": (4,),
                "dropout_p": 0.3,
                "seed": 5,
                "causal": True,
            },
        ),
        (
            "large",
            "m64n32w4s2-overlap",
            (1, 64, 200, 1, 1, 64, 64),
            "float16",
            "large",
            {"causal": True},
        ),
    )
    return tuple(
        (f"sm90-{config}", AttentionCase(name, shape, dtype, inputs, options))
        for name, config, shape, dtype, inputs, options in table
    )


HOPPER_CASES = _hopper()
