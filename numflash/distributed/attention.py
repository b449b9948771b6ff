"""Attention over several GPUs and its gradients, as people call them."""

from numflash.distributed.agreement import on_its_way
from numflash.distributed.call import RankedCall, sum_over_ranks, with_batch
from numflash.distributed.communicators import Communicator
from numflash.distributed.layouts import Layout
from numflash.problem.options import GradientOptions


def attention(
    q,
    k,
    v,
    *,
    layout: Layout,
    comm: Communicator | tuple[Communicator, Communicator],
    method: str | tuple[str, str] = "auto",
    wire=None,
    max_workspace: int | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    return_lse: bool = False,
    out_dtype: str | None = None,
    **options,
):
    """Attention over sequences whose tokens are spread over several GPUs.

    Each rank calls it with its own tokens, and with the same options. CuPy arrays, PyTorch
    tensors, or in the simulator NumPy arrays.

    Args:
        q: (batch, tokens, num_heads_q, head_dim) of this rank's tokens, in the order that layout
            says; float16, bfloat16 or float32. Without a batch axis too.
        k: (batch, tokens, num_heads_kv, head_dim); v: (batch, tokens, num_heads_kv, head_dim_v).
        layout: who holds which tokens. Positions, as rotary embeddings take them, are
            `layout.positions(rank)`.
        comm: the ranks. With two methods two: (the ranks that change heads for tokens, which are
            neighbours; the ranks with this one's number among their neighbours). This rank then is
            `comm[1].rank * comm[0].size + comm[0].rank` of layout.
        method: "gather": each rank fetches the keys and values that its queries see, some heads at
            a time, while it computes with those before. out and lse have the bits of one GPU.
            "ring": keys and values go round. "heads": tokens of all heads are changed for heads of
            all tokens, and back; the ranks must divide num_heads_q, and divide num_heads_kv or be
            a multiple of it. ("heads", "gather") or ("heads", "ring"): heads among neighbours, the
            other among their groups. "auto": gather, or ring where gather would take more
            memory than that (than max_workspace, if given) or too many messages at a time.
        wire: None: keys and values travel as they are. "e4m3", or an `Fp8Recipe` with scales of
            tokens or blocks: in 8 bits, quantised once by their owner, whose own queries see them
            so, too. They become 16 bits again where they arrive; precision="fp8" multiplies the
            codes. With two methods across groups only.
        max_workspace: bytes that gather may take beyond inputs and results: two groups of as
            many key-value heads as fit, at least one; None is max(1, num_heads_kv // ranks) each.
        causal: each query sees the keys of its document up to its own position.
        window_size: (left, right), by position; -1 or None is no limit.
        return_lse: also return the log-sum-exp.
        out_dtype: as of `numflash.attention`.
        options: those of `numflash.attention` that hold for the whole problem: softmax_scale,
            softcap, sinks and alibi_slopes of all heads; dropout_p with seed, bias, mask,
            score_mod, mask_mod and aux by global rows and columns, of several documents by those
            of each and its number, as in `attention_varlen`; a block_mask, with segments that
            begin where its blocks do; precision, config. Without a config
            gather and heads run on all ranks the one that
            `numflash.distributed.whole.pinned_config` names.

    Returns:
        out: (batch, tokens, num_heads_q, head_dim_v) of this rank's tokens.
        lse: with return_lse, (batch, num_heads_q, tokens) float32.

    Raises:
        TypeError, ValueError, UnsupportedError: as `numflash.attention`; a layout of other tokens
            or ranks; heads that ranks cannot share; causal_align, shift or origin, which the
            layout says; lengths, precision="auto", "fp8" without wire or by heads alone; a
            block_mask with documents or options by position; with several documents and
            a batch, or in 8 bits, dropout, bias, mask and functions. Before anything travels, and
            on all ranks alike, also where they differ in what they ask for.
        CommunicatorError: a rank is gone, or did not come within the deadline of its group.

    Memory beyond inputs and results, of each rank, S tokens in all, of 16 bits: gather two buffers
    of S keys and values of a group of heads; ring two of a rank's keys and values, and out in
    float32, of which each call adds a part; heads q, k, v and out once more.

    Nothing waits on the host where the communicator does not. Sources: Llama 3, arXiv 2407.21783
    (gather); Ring Attention, arXiv 2310.01889; Ulysses, arXiv 2309.14509.

    Example:
        >>> import threading
        >>> import numpy as np
        >>> from numflash.distributed import Layout, attention, local
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 32, 2, 16)).astype("float16")
        >>> layout, found = Layout.zigzag(32, ranks=2), {}
        >>> def run(comm):
        ...     own = (layout.shard(x, comm.rank) for x in (q, k, v))
        ...     out = attention(*own, layout=layout, comm=comm, causal=True)
        ...     found[comm.rank] = layout.gather(out, comm)
        >>> threads = [threading.Thread(target=run, args=(comm,)) for comm in local(2)]
        >>> for thread in threads:
        ...     thread.start()
        >>> for thread in threads:
        ...     thread.join()
        >>> bool((found[0] == found[1]).all()), found[0].shape
        (True, (1, 32, 2, 16))
    """
    options |= {"causal": causal, "window_size": window_size, "out_dtype": out_dtype}
    call = RankedCall("attention", layout, comm, method, wire, max_workspace, options)
    ready = call.agreed({"q": q, "k": k, "v": v})
    operands = with_batch({"q": q, "k": k, "v": v})
    problem = ready.problem(options)
    in_float32 = out_dtype == "float32"
    with on_its_way(call.comms, "attention"):
        out, lse = ready.method.forward(problem, *operands.values(), float32=in_float32)
    if len(q.shape) == 3:
        out, lse = out[0], lse[0]
    return (out, lse) if return_lse else out


def attention_backward(
    dout,
    q,
    k,
    v,
    out,
    lse,
    *,
    layout: Layout,
    comm: Communicator | tuple[Communicator, Communicator],
    method: str | tuple[str, str] = "auto",
    travels: str = "auto",
    wire=None,
    max_workspace: int | None = None,
    dlse=None,
    wrt: tuple[str, ...] | None = None,
    grad_dtype: str | None = None,
    causal: bool = False,
    window_size: tuple[int | None, int | None] = (-1, -1),
    **options,
) -> tuple:
    """The gradients of `attention`, of this rank's tokens.

    Args:
        dout: gradient of the result, shaped like it.
        q, k, v, layout, comm, method, wire, causal, window_size, options: as given to `attention`.
        out, lse: as returned by `attention(..., return_lse=True)`; out may be float32.
        travels: of a ring what goes round: "keys", "queries", or "auto", what takes fewer bytes.
        max_workspace: as of `attention`, here also for shares of dk and dv in float32.
        dlse: gradient of lse, shaped like it, where a loss depends on it.
        wrt: what to return gradients of, in this order: "q", "k", "v"; with sinks "sinks"; with
            alibi_slopes "alibi_slopes"; with bias "bias"; "aux0", "aux1", ... of arrays that
            score_mod reads. None is ("q", "k", "v"), and with sinks also "sinks".
        grad_dtype: "float32" leaves gradients in float32, as they were summed; None is the dtype
            of q for dq, dk and dv, and that of the array for others.

    Returns:
        A tuple with a gradient for each name in wrt. dq, dk and dv are of this rank's tokens,
        shaped like q, k and v; those of sinks, alibi_slopes, bias and aux are of the whole
        problem, as the arrays are, and the same on all ranks. The same call gives the same bits,
        in whatever order messages arrive: shares are added in float32, in the order of ranks or
        of steps.

    Raises:
        TypeError, ValueError, UnsupportedError, CommunicatorError: as `attention`.

    Memory beyond inputs and results, of each rank: float32 results, where they are returned in 16
    bits; and gather two buffers of S keys and values of a group of heads, and twice their float32
    gradients; ring a rank's keys and values twice, and their float32 gradients three times; heads
    q, k, v, dout and their gradients once more; and with each method the gradients of one call,
    of a bias and of aux twice in float32 and whole.

    Example:
        >>> import numpy as np
        >>> from numflash.distributed import Layout, attention, attention_backward, local
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 32, 2, 16)).astype("float16")
        >>> (comm,) = local(1)
        >>> ranks = {"layout": Layout.zigzag(32, ranks=1), "comm": comm, "causal": True}
        >>> out, lse = attention(q, k, v, return_lse=True, **ranks)
        >>> dq, dk, dv = attention_backward(np.ones_like(out), q, k, v, out, lse, **ranks)
        >>> dq.shape == q.shape, dv.dtype
        (True, dtype('float16'))
    """
    options |= {"causal": causal, "window_size": window_size}
    asked = GradientOptions(None, None, wrt, grad_dtype)
    call = RankedCall(
        "attention_backward", layout, comm, method, wire, max_workspace, options, asked, travels
    )
    given = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "lse": lse}
    if dlse is not None:
        given["dlse"] = dlse
    ready = call.agreed(given)
    operands = with_batch(given)
    problem = ready.problem(options)
    with on_its_way(call.comms, "attention_backward"):
        found = ready.method.backward(problem, operands, 0, ready.wrt, **ready.of_backward)
        arrays = problem.arrays
        dtype = grad_dtype or arrays.dtype_of(q)
        results = []
        for name in ready.wrt:
            gradient = found.pop(name)
            if name in ("q", "k", "v"):
                gradient = arrays.contiguous(arrays.astype(gradient, dtype))
                results.append(gradient[0] if len(q.shape) == 3 else gradient)
            else:
                total = sum_over_ranks(problem, gradient, name)
                own = arrays.dtype_of(problem.calls.option(name))
                results.append(arrays.astype(total, grad_dtype or own))
    return tuple(results)


def ring_attention(q, k, v, *, layout: Layout, comm: Communicator, **options):
    """`attention` by a ring: keys and values go from rank to rank.

    For what does not fit by gathering (fewer key-value heads than ranks), and between nodes. The
    ring stops at the last step at which any rank sees anything.

    Args:
        q, k, v, layout, comm: as of `attention`.
        options: the others of `attention`, without method.

    Returns, Raises: as `attention`.

    Source: Ring Attention, arXiv 2310.01889.

    Example:
        >>> import numpy as np
        >>> from numflash.distributed import Layout, local, ring_attention
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 32, 2, 16)).astype("float16")
        >>> (comm,) = local(1)
        >>> layout = Layout.zigzag(32, ranks=1)
        >>> ring_attention(q, k, v, layout=layout, comm=comm, causal=True).shape
        (1, 32, 2, 16)
    """
    return attention(q, k, v, layout=layout, comm=comm, method="ring", **options)


def ulysses_attention(q, k, v, *, layout: Layout, comm: Communicator, **options):
    """`attention` by heads: ranks change tokens of all heads for heads of all tokens, and back.

    Args:
        q, k, v, layout, comm: as of `attention`. The ranks must divide num_heads_q, and divide
            num_heads_kv or be a multiple of it. Key-value heads travel to the ranks that use them,
            and are not repeated before.
        options: the others of `attention`, without method.

    Returns, Raises: as `attention`; ValueError: heads that the ranks cannot share.

    Source: DeepSpeed Ulysses, arXiv 2309.14509.

    Example:
        >>> import numpy as np
        >>> from numflash.distributed import Layout, local, ulysses_attention
        >>> q, k, v = np.random.default_rng(0).standard_normal((3, 1, 32, 2, 16)).astype("float16")
        >>> (comm,) = local(1)
        >>> layout = Layout.contiguous(32, ranks=1)
        >>> ulysses_attention(q, k, v, layout=layout, comm=comm, window_size=(8, 0)).shape
        (1, 32, 2, 16)
    """
    return attention(q, k, v, layout=layout, comm=comm, method="heads", **options)
