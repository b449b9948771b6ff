"""FlashAttention-4's kernels for Hopper as cubins, compiled without a GPU.

    pip install nvidia-cutlass-dsl nvidia-cutlass-dsl-libs-cu13 quack-kernels einops apache-tvm-ffi
    pip install torch triton && pip install --no-deps flash-attn-4
    python -m bench.peers.flash_attention_4 build/fa4
    python -m bench machine-code --against build/fa4

CuTe compiles them for arrays that do not exist. Its own assembler makes the machine code. The
packages may lie in an environment of their own: only this module runs there.
"""

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

HEAD_DIMS = (64, 96, 128, 192, 256)
_PARTS = {"forward": "fwd_sm90", "backward": "bwd_sm90"}
"""Pass -> what the names of its main kernel's files hold."""
_BATCH, _SEQLEN, _HEADS = 1, 256, 2


def environment(dumps: Path) -> dict[str, str]:
    """What the packages read from the environment when they are imported.

    Args:
        dumps: the folder of the cubins.
    """
    return {
        # A fake tensor has no device to be asked.
        "FLASH_ATTENTION_FAKE_TENSOR": "1",
        "FLASH_ATTENTION_NUM_SMS": "132",
        "FLASH_ATTENTION_ARCH": "sm_90",
        "CUTE_DSL_ARCH": "sm_90a",
        "CUTE_DSL_KEEP_CUBIN": "1",
        "CUTE_DSL_DUMP_DIR": str(dumps),
    }


def name_of(direction: str, head_dim: int, causal: bool) -> str:
    """The name of a kernel's file."""
    return f"fa4-{direction}-d{head_dim}{'-causal' if causal else ''}.cubin"


def compile_all(out: Path, directions: list[str], head_dims: list[int], dtype: str) -> list[str]:
    """Write the kernels without a mask and with a causal one; what went wrong, a line for each."""
    failed = []
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(environment(Path(folder)))
        for direction in directions:
            for head_dim in head_dims:
                for causal in (False, True):
                    name = name_of(direction, head_dim, causal)
                    try:
                        _compile(direction, head_dim, causal, dtype)
                        # It has the same name for each shape.
                        shutil.move(_newest(Path(folder), _PARTS[direction]), out / name)
                    except Exception as error:
                        failed.append(f"{name}: {' '.join(str(error).split()) or repr(error)}")
    return failed


def _newest(folder: Path, part: str) -> Path:
    """The file of a part that was just written. Raises ValueError if there is none, or several."""
    found = list(folder.glob(f"*{part}*.cubin"))
    if len(found) != 1:
        raise ValueError(f"CuTe wrote {len(found)} cubins whose names hold {part}, not one")
    return found[0]


def _compile(direction: str, head_dim: int, causal: bool, dtype: str) -> None:
    import torch
    from flash_attn.cute import interface
    from torch._subclasses.fake_tensor import FakeTensorMode

    shape = _BATCH, _SEQLEN, _HEADS, head_dim
    with FakeTensorMode():
        q, k, v, out, dout = (
            torch.empty(shape, dtype=getattr(torch, dtype), device="cuda") for _ in range(5)
        )
        if direction == "forward":
            interface._flash_attn_fwd(q, k, v, causal=causal, return_lse=True)
        else:
            lse = torch.empty(_BATCH, _HEADS, _SEQLEN, dtype=torch.float32, device="cuda")
            interface._flash_attn_bwd(q, k, v, out, dout, lse, causal=causal)


def main(arguments: list[str] | None = None) -> int:
    """Write the cubins; 1 where one was not made."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of the cubins")
    parser.add_argument("--directions", nargs="+", choices=_PARTS, default=["backward"])
    parser.add_argument("--head-dims", nargs="+", type=int, default=list(HEAD_DIMS))
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    given = parser.parse_args(arguments)
    failed = compile_all(given.out, given.directions, given.head_dims, given.dtype)
    print("\n".join([*failed, f"{len(list(given.out.glob('*.cubin')))} cubins in {given.out}"]))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
