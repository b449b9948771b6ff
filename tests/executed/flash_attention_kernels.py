"""The process that compiles FlashAttention-4's kernels for Hopper: no GPU is needed.

    python flash_attention_kernels.py < request

reads the pickled arguments of `compiled`, and answers with what it returns, pickled, too.
"""

import os
import pickle
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

_DUMPS = tempfile.TemporaryDirectory()
# Read when the packages are imported. A fake tensor has no device to be asked.
os.environ.update(
    FLASH_ATTENTION_FAKE_TENSOR="1",
    FLASH_ATTENTION_NUM_SMS="132",
    FLASH_ATTENTION_ARCH="sm_90",
    CUTE_DSL_ARCH="sm_90a",
    CUTE_DSL_KEEP_PTX="1",
    CUTE_DSL_DUMP_DIR=_DUMPS.name,
)

import torch  # noqa: E402
from flash_attn.cute import interface  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402


def compiled(head_dim: int, causal: bool, dtype: str, backward: bool = False) -> dict:
    """What `tests/executed/test_witnesses_flash_attention.py` runs.

    Returns:
        {"forward": PTX, "tiles": (rows, keys) of a tile}, or of the backward "preprocess", "main"
        and "postprocess", with "tiles" those of "main".
    """
    with FakeTensorMode():
        q, k, v, out, dout = (
            torch.empty(1, 256, 2, head_dim, dtype=getattr(torch, dtype), device="cuda")
            for _ in range(5)
        )
        if backward:
            lse = torch.empty(1, 2, 256, dtype=torch.float32, device="cuda")
            interface._flash_attn_bwd(q, k, v, out, dout, lse, causal=causal)
            config = asdict(interface._tile_size_bwd_sm90(head_dim, head_dim, causal, False))
        else:
            interface._flash_attn_fwd(q, k, v, causal=causal, return_lse=True)
            config = asdict(interface._tile_size_fwd_sm90(head_dim, head_dim, causal, False))
    files = {"preprocess": "bwd_preprocess", "main": "bwd_sm90", "postprocess": "bwd_postprocess"}
    found = {"tiles": (config["m_block_size"], config["n_block_size"])}
    for name, part in (files if backward else {"forward": "fwd_sm90"}).items():
        (path,) = Path(_DUMPS.name).glob(f"*{part}*.ptx")
        found[name] = path.read_text()
    return found


if __name__ == "__main__":
    request = pickle.load(sys.stdin.buffer)
    # What others print is none of the answer.
    answer_to, sys.stdout = sys.stdout.buffer, sys.stderr
    answer_to.write(pickle.dumps(compiled(**request)))
