"""Who vouches for our instructions: the record that witnesses write, and the page made of it.

    python -m tests.executed.evidence      draws docs/evidence.md of docs/evidence.json

A witness is a test that runs another compiler's kernel in the executor. One that passes enters
what was executed into the record; so does each wrong meaning that a witness noticed.
"""

import json
from collections.abc import Iterable
from datetime import date
from pathlib import Path

_DOCS = Path(__file__).parents[2] / "docs"
RECORD, PAGE = _DOCS / "evidence.json", _DOCS / "evidence.md"

_SECONDS = 300
"""Of user CPU time: all witnesses and wrong meanings once, with nothing kept of an earlier run."""
WITHOUT = {
    "fence_proxy_tensormap": "changes nothing on a CPU: a wrong meaning could not be noticed",
    "prefetch_tensormap": "changes nothing on a CPU: a wrong meaning could not be noticed",
    "bra_over_barrier": "a branch that is never taken; no other compiler has it",
    **dict.fromkeys(
        (
            "lg2_approx_ftz_f32",
            "div_full_ftz_f32",
            "sqrt_approx_ftz_f32",
            "rsqrt_approx_ftz_f32",
            "sin_approx_ftz_f32",
            "cos_approx_ftz_f32",
            "cvt_rmi_f32_f32",
            "cvt_rzi_s32_f32",
            "div_u32",
        ),
        "its body is NumPy's function, checked in float64; no kernel that vouches has it",
    ),
    **dict.fromkeys(
        ("ld_global_pair_b16", "ld_global_pair_b32", "ld_global_pair_b64"),
        "several instructions at once, loads among them, which have witnesses one by one",
    ),
    "ld_shared_v4_u32": "ld_shared_v4_f32 with another type; witnesses have not been run with it",
    **dict.fromkeys(
        ("ld_acquire_gpu_u32", "st_release_gpu_u32", "fence_proxy_async_global"),
        "no kernel that vouches has one; `tests/executed/test_turns.py` leaves each out",
    ),
    **dict.fromkeys(
        (
            "barrier_cluster_arrive",
            "barrier_cluster_wait",
            "mov_cluster_ctarank",
            "mov_clusterid_x",
            "mov_nclusterid_x",
            "mbarrier_arrive_remote",
            "cp_async_bulk_tensor_4d_multicast",
            "cp_async_bulk_tensor_5d_multicast",
        ),
        "no kernel that vouches has a cluster; `tests/sim/test_clusters.py` and "
        "`tests/sim/test_cluster_copies.py` have what goes wrong",
    ),
    "tanh_approx_f32": "its body is as far off as it may be; no kernel that vouches has it",
    "atom_inc_gpu_u32": "a count; `tests/executed/test_atomics.py` says what it gives",
    "cp_async_bulk_store": "cp_reduce_async_bulk_add_f32 without the sum, which has a witness",
    "cp_async_bulk_wait_group": "cp_async_bulk_wait_group_read, which has a witness, and writes",
    "red_global_add_s64": "a sum of integers that NumPy has; no kernel that vouches has it",
}
"""Instructions of `numflash/ptx` that can have no witness, and why."""


def read() -> dict:
    """The record.

    {"witnesses": {test: {"compiler", "module", "date", "instructions"}},
    "noticed": {wrong meaning: {"instruction", "witness", "date"}}, "without": {name: why}}.
    """
    return json.loads(RECORD.read_text())


def enter(
    module: str, witnesses: dict[str, dict], noticed: dict[str, dict], wrong: Iterable[str] | None
) -> None:
    """Add to the record; what says the same keeps its date, and another version begins anew.

    Args:
        module: whose witnesses ran.
        witnesses, noticed: what passed, as in the record.
        wrong: the wrong meanings that witnesses of this module are tried with, if they were:
            others that these have noticed once are dropped.
    """
    record = read() if RECORD.exists() else {"witnesses": {}, "noticed": {}}
    for name, entry in witnesses.items():
        before = record["witnesses"].get(name)
        if before is not None and before["compiler"] == entry["compiler"]:
            # A run may be of some of a witness's cases only.
            together = {*before["instructions"], *entry["instructions"]}
            entry["instructions"] = sorted(together)
    for kept, entries in (
        (record["witnesses"], witnesses),
        (record["noticed"], noticed),
    ):
        for name, entry in entries.items():
            if {**kept.get(name, {}), "date": None} != {**entry, "date": None}:
                kept[name] = {**entry, "date": date.today().isoformat()}
    if wrong is not None:
        by = {name for name, entry in record["witnesses"].items() if entry["module"] == module}
        record["noticed"] = {
            meaning: entry
            for meaning, entry in record["noticed"].items()
            if meaning in set(wrong) or entry["witness"] not in by
        }
    record = {part: dict(sorted(record[part].items())) for part in ("witnesses", "noticed")}
    record["without"] = WITHOUT
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


def witnesses_of(record: dict) -> dict[str, list[str]]:
    """The tests that vouch for each instruction that has any."""
    found: dict[str, list[str]] = {}
    for test, entry in record["witnesses"].items():
        for name in entry["instructions"]:
            found.setdefault(name, []).append(test)
    return found


def page(record: dict) -> str:
    """docs/evidence.md."""
    ours, others = [], []
    for name, tests in sorted(witnesses_of(record).items()):
        noticed = [
            f"{meaning} (`{entry['witness']}`)"
            for meaning, entry in record["noticed"].items()
            if entry["instruction"] == name
        ]
        # Names of ours have no dots; opcodes have.
        rows = others if "." in name else ours
        rows.append((f"`{name}`", _by_compiler(record, tests), "; ".join(noticed)))
    seen: dict[str, dict] = {}
    for entry in record["witnesses"].values():
        of = seen.setdefault(entry["compiler"], {"modules": set(), "date": "", "tests": 0})
        of["modules"].add(f"`tests/executed/{entry['module']}.py`")
        of["date"] = max(of["date"], entry["date"])
        of["tests"] += 1
    return _TEXT.format(
        compilers=_table(
            ("witnesses", "tests", "in", "last changed"),
            [
                (compiler, str(of["tests"]), ", ".join(sorted(of["modules"])), of["date"])
                for compiler, of in sorted(seen.items())
            ],
        ),
        noticed=len(record["noticed"]),
        seconds=_SECONDS,
        table=_table(("instruction", "witness", "wrong on purpose, and noticed by"), ours),
        others=_table(("opcode", "witness", "wrong on purpose, and noticed by"), others),
        without=_table(
            ("instruction", "why"),
            [(f"`{name}`", why) for name, why in sorted(record["without"].items())],
        ),
    )


def _by_compiler(record: dict, tests: list[str]) -> str:
    """The tests, behind the name of their compiler without its version."""
    found: dict[str, list[str]] = {}
    for test in tests:
        compiler = record["witnesses"][test]["compiler"].rpartition(" ")[0]
        found.setdefault(compiler, []).append(f"`{test}`")
    return "; ".join(f"{name}: {', '.join(of)}" for name, of in sorted(found.items()))


def _table(header: Iterable[str], rows: Iterable[tuple]) -> str:
    header = tuple(header)
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


_TEXT = """\
# Who vouches for our instructions

*Drawn from [evidence.json](evidence.json) by `python -m tests.executed.evidence`; do not edit it.*

No GPU has run numflash. What instructions mean is written in the bodies of `numflash/ptx/` and in the parts of
the simulator, read from the manuals. The executor uses the same bodies. So when it runs a kernel of another
compiler, whose code GPUs run every day, and the result is right, that compiler vouches for our meanings.

{compilers}

Triton's and CuTe's kernels are written for this, FlashAttention-4's are its own, forward and backward: all of them
compile without a GPU, are run by the executor, and compared with float64. PyTorch's conversions are compared with
the bodies of ours, bit by bit. Witnesses write the record where they pass:

    pip install triton                                  # 290 MB to load, 1 GB on disk
    pip install torch nvidia-cutlass-dsl nvidia-cutlass-dsl-libs-cu13     # 5 GB on disk
    pip install quack-kernels einops apache-tvm-ffi && pip install --no-deps flash-attn-4==4.0.0b36
    NUMBA_ENABLE_CUDASIM=1 NUMFLASH_TEST_PEERS=1 pytest tests/executed -k "witnesses or wrong_meanings"

A test whose package is missing is skipped. A witness shows that kernels which use an instruction compute what they
should. It does not show what the instruction does with operands that no kernel gives it, nor how fast it is, nor
what ptxas makes of it. CI does not run the witnesses: they take some {seconds} s of user CPU time beside the installation.

## Instructions with a witness

The last column is what tests make of the instruction on purpose, {noticed} times in all; the witness behind it fails
then. No row is without. Loads and stores of other compilers are typed `.b32`: they vouch for
`.u32` and `.f32` of the same size. `bar.sync 0`, for all threads, is `bar_sync`, too. `mul.f32` and `mul.f16x2` vouch
for `mul.rn`, which they are, and `lop3` with another table for ours, which the executor looks up alike.

{table}

Triton loads and stores tiles of three to five dimensions with the same swizzle, so that a wrong one would cancel out;
CuTe's `test_tiles_of_tensor_maps` reads each element where CuTe says it is, and stores the tile without a swizzle.

## What only the executor knows

Other compilers use them, kernels of numflash do not.

{others}

## Instructions without a witness

{without}

Nor has anybody vouched for the 128 bytes that the driver makes of a tensor map: they would have to be compared with
those that `libcuda` writes, which comes with a driver and not as a package. Here a map stands for what it was made
of. That `setmaxnreg.inc` is needed cannot be seen, either: nothing here runs out of registers for want of it.

## Sequences with lengths of their own

Their kernels have no instruction of their own. What is new is how they use tensor maps: a
*ragged* map has two dimensions with the stride of a row, and begins below its array (`numflash/problem/tensor_maps.py`).
No witness loads or stores through such a map. The simulator finds its rows by the same formula, and refuses a tile that
leaves the array; a GPU is asked by the cases `ragged keys`, `ragged queries` and `a page` of
`tests/support/bulk_copy_cases.py`. FlashAttention-4 and Triton use such maps on Hopper, by their sources.

Our own compiled kernels run in the executor, which shows that compilers kept their meaning:

| what | compared with | in |
| --- | --- | --- |
| lists of tiles, with splits and wrong lengths | the reference, word for word | `test_schedule.py` |
| forward and gradients of packed and padded sequences | float64, and the bits of the source | `test_varlen.py` |
| Hopper's forward on ragged maps | the bits of the source | `test_ragged_forward.py` |
| decoding from pages, and what it reads | float64, the bits of the source, bytes | `test_decoding.py` |
| appending to a cache, and attention over it | float64; the cache has the bits of the source | `test_kvcache.py` |
| rotary embeddings | the bits of the source | `test_rotary.py` |
| a part merged onto what is there | float64, and the bits of the source | `test_merge_onto.py` |

## Where others and our checks differ

- Triton sets no fence between `mbarrier.init` and bulk copies. We demand `fence.mbarrier_init`, which CuTe and
  FlashAttention-4 set; the tests put it into Triton's text
  (`test_where_we_ask_for_more_fences_than_triton_sets` shows the refusal without).
- Triton's attention for sm_90 stores Q, waits at a barrier, and then the readers execute `fence.proxy.async`;
  CuTe and FlashAttention-4 have it executed by the writers, before the barrier. Both pass.
- Triton passes float32 to products of tf32 unrounded; the tests cut the low 13 bits of their reference.
"""  # noqa: E501


if __name__ == "__main__":
    PAGE.write_text(page(read()))
