"""A straightforward Triton kernel for attention's forward: what a day's work in Triton gives.

A program owns BLOCK_M rows of Q and walks over K and V in tiles of BLOCK_N with the online
softmax; tiles below the diagonal skip the mask, tiles above it are not visited. No warp
specialisation, no tensor-memory descriptors: the pipelining is what Triton does by itself.
"""

import math

import torch
import triton
import triton.language as tl

_CONFIGS = [
    triton.Config({"BLOCK_M": block_m, "BLOCK_N": block_n}, num_warps=warps, num_stages=stages)
    for block_m, block_n, warps, stages in (
        (128, 128, 8, 3),
        (128, 64, 8, 3),
        (128, 64, 4, 3),
        (64, 64, 4, 3),
        (128, 32, 8, 2),
        (64, 32, 4, 2),
    )
]


@triton.jit
def _attend_to_tile(
    o_acc, row_max, row_sum, q, k, v, k_row, v_row, n_start, rows, columns, seqlen_k, shift,
    scale_log2, MASKED: tl.constexpr,
):  # fmt: skip
    """One tile of K and V: scores, online softmax, O += P V."""
    keys = n_start + columns
    is_key = keys < seqlen_k
    k_tile = tl.load(k + keys[None, :] * k_row, mask=is_key[None, :], other=0.0)
    s_acc = tl.dot(q, k_tile) * scale_log2
    if MASKED:
        is_seen = is_key[None, :] & (keys[None, :] <= rows[:, None] + shift)
        s_acc = tl.where(is_seen, s_acc, -float("inf"))
    new_max = tl.maximum(row_max, tl.max(s_acc, 1))
    # A row that has seen no key yet has maximum -inf, and -inf - -inf is NaN.
    finite_max = tl.where(new_max == -float("inf"), 0.0, new_max)
    p = tl.exp2(s_acc - finite_max[:, None])
    row_scale = tl.exp2(row_max - finite_max)
    row_sum = row_sum * row_scale + tl.sum(p, 1)
    v_tile = tl.load(v + keys[:, None] * v_row, mask=is_key[:, None], other=0.0)
    o_acc = tl.dot(p.to(v_tile.dtype), v_tile, o_acc * row_scale[:, None])
    return o_acc, new_max, row_sum


@triton.jit
def forward_kernel(
    q, k, v, out,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    out_batch, out_row, out_head,
    num_heads_q, group_size, seqlen_q, seqlen_k, scale_log2,
    HEAD_DIM: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """O of BLOCK_M rows of one head; program (m_block, batch * head)."""
    # The last rows of a causal problem see the most keys: they start first.
    m_start = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head = tl.program_id(1) % num_heads_q
    batch = (tl.program_id(1) // num_heads_q).to(tl.int64)
    head_kv = head // group_size
    shift = seqlen_k - seqlen_q
    rows, columns = m_start + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    dims = tl.arange(0, HEAD_DIM)
    is_row = (rows < seqlen_q)[:, None]

    q_tile = tl.load(
        q + batch * q_batch + head * q_head + rows[:, None] * q_row + dims[None, :],
        mask=is_row,
        other=0.0,
    )
    k_dims = k + batch * k_batch + head_kv * k_head + dims[:, None]
    v_dims = v + batch * v_batch + head_kv * v_head + dims[None, :]
    o_acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    row_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)

    end = seqlen_k
    if CAUSAL:
        end = tl.maximum(0, tl.minimum(seqlen_k, m_start + BLOCK_M + shift))
        first_masked = tl.maximum(0, tl.minimum(end, m_start + shift + 1)) // BLOCK_N * BLOCK_N
    else:
        first_masked = seqlen_k // BLOCK_N * BLOCK_N
    for n_start in range(0, first_masked, BLOCK_N):
        o_acc, row_max, row_sum = _attend_to_tile(
            o_acc, row_max, row_sum, q_tile, k_dims, v_dims, k_row, v_row, n_start, rows, columns,
            seqlen_k, shift, scale_log2, False,
        )  # fmt: skip
    for n_start in range(first_masked, end, BLOCK_N):
        o_acc, row_max, row_sum = _attend_to_tile(
            o_acc, row_max, row_sum, q_tile, k_dims, v_dims, k_row, v_row, n_start, rows, columns,
            seqlen_k, shift if CAUSAL else seqlen_k, scale_log2, True,
        )  # fmt: skip

    o = o_acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    tl.store(
        out + batch * out_batch + head * out_head + rows[:, None] * out_row + dims[None, :],
        o.to(out.dtype.element_ty),
        mask=is_row,
    )


_tuned_kernel = triton.autotune(configs=_CONFIGS, key=["seqlen_q", "HEAD_DIM", "CAUSAL"])(
    forward_kernel
)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, blocks=None):
    """softmax(Q K^T / sqrt(head_dim)) V.

    Args:
        q, k, v: (batch, seqlen, heads, head_dim), head_dim a power of two from 16 on, contiguous
            in the last axis.
        causal: aligned to the bottom right.
        blocks: (BLOCK_M, BLOCK_N), to choose them by hand; None tunes.
    """
    batch, seqlen_q, num_heads_q, head_dim = q.shape
    out = torch.empty_like(q)
    strides = [stride for x in (q, k, v, out) for stride in x.stride()[:3]]
    sizes = num_heads_q, num_heads_q // k.shape[2], seqlen_q, k.shape[1]
    scale_log2 = head_dim**-0.5 * math.log2(math.e)
    options = {"HEAD_DIM": head_dim, "CAUSAL": causal}
    kernel = _tuned_kernel
    if blocks is not None:
        kernel = forward_kernel
        options |= {"BLOCK_M": blocks[0], "BLOCK_N": blocks[1]}

    def launch_grid(meta):
        return triton.cdiv(seqlen_q, meta["BLOCK_M"]), batch * num_heads_q

    kernel[launch_grid](q, k, v, out, *strides, *sizes, scale_log2, **options)
    return out
