"""A block of a transformer learns: forward, backward and a step, without a framework.

    python examples/train_block.py

On CuPy, or in the simulator on NumPy. Attention is numflash's, forward and backward; layer norm,
the layers around it and their gradients are a few lines of array code each. The task needs
attention: each token is to become the token before it, which the block has to find by its place.
"""

import sys

import numpy as np

import numflash
from numflash.runtime.commands import command

if numflash.simulating():
    xp = np
else:
    import cupy as xp

BATCH, SEQLEN, HEADS, HEAD_DIM = 2, 16, 2, 16
WIDTH, TOKENS, STEPS = HEADS * HEAD_DIM, 8, 10
DTYPE = "float16"  # of q, k and v; all else is float32
RATE, BETA_1, BETA_2 = 0.02, 0.9, 0.95


def new_parameters(rng) -> dict:
    """Arrays by name: matrices, and the gain of each norm."""

    def matrix(rows, columns):
        return xp.asarray(rng.standard_normal((rows, columns)).astype("f4") / rows**0.5)

    return {
        "norm_1": xp.ones(WIDTH, "f4"),
        "to_heads": matrix(WIDTH, 3 * WIDTH),
        "from_heads": matrix(WIDTH, WIDTH),
        "norm_2": xp.ones(WIDTH, "f4"),
        "wide": matrix(WIDTH, 4 * WIDTH),
        "narrow": matrix(4 * WIDTH, WIDTH),
    }


def norm(x, gain):
    """Layer norm of the last axis: (result, what its backward reads)."""
    centred = x - x.mean(-1, keepdims=True)
    scale = 1 / xp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    return centred * scale * gain, (centred * scale, scale)


def norm_backward(dy, gain, saved):
    """Gradients of x and of gain."""
    unit, scale = saved
    d = dy * gain
    dx = scale * (d - d.mean(-1, keepdims=True) - unit * (d * unit).mean(-1, keepdims=True))
    return dx, (dy * unit).sum((0, 1))


def forward(p: dict, x):
    """(result, what `backward` reads), of x (batch, seqlen, width)."""
    a, norm_1 = norm(x, p["norm_1"])
    qkv = (a @ p["to_heads"]).astype(DTYPE).reshape(BATCH, SEQLEN, 3, HEADS, HEAD_DIM)
    q, k, v = (qkv[:, :, n] for n in range(3))
    out, lse = numflash.attention(q, k, v, causal=True, return_lse=True)
    heads = out.reshape(BATCH, SEQLEN, WIDTH).astype("f4")
    h = x + heads @ p["from_heads"]
    b, norm_2 = norm(h, p["norm_2"])
    wide = xp.maximum(b @ p["wide"], 0)
    return h + wide @ p["narrow"], (a, norm_1, (q, k, v, out, lse), heads, b, norm_2, wide)


def of_weight(x, dy):
    """The gradient of a matrix w, of the gradient of x @ w."""
    return x.reshape(-1, x.shape[-1]).T @ dy.reshape(-1, dy.shape[-1])


def backward(p: dict, dy, saved) -> dict:
    """The gradients of the parameters, by name."""
    a, norm_1, attention, heads, b, norm_2, wide = saved
    g = {"narrow": of_weight(wide, dy)}
    dwide = dy @ p["narrow"].T * (wide > 0)
    g["wide"] = of_weight(b, dwide)
    dh, g["norm_2"] = norm_backward(dwide @ p["wide"].T, p["norm_2"], norm_2)
    dh += dy
    g["from_heads"] = of_weight(heads, dh)
    dout = (dh @ p["from_heads"].T).astype(DTYPE).reshape(BATCH, SEQLEN, HEADS, HEAD_DIM)
    dqkv = numflash.attention_backward(dout, *attention, causal=True)
    dqkv = xp.stack(dqkv, 2).reshape(BATCH, SEQLEN, 3 * WIDTH).astype("f4")
    g["to_heads"] = of_weight(a, dqkv)
    _, g["norm_1"] = norm_backward(dqkv @ p["to_heads"].T, p["norm_1"], norm_1)
    return g


def loss_and_gradients(p: dict, x, target):
    """The mean square of the error, and the gradients of the parameters, by name."""
    y, saved = forward(p, x)
    error = y - target
    return float((error**2).mean()), backward(p, 2 / error.size * error, saved)


def step(p: dict, g: dict, moments: dict, n: int) -> None:
    """Adam's, in place; n counts from 1."""
    for name, slope in g.items():
        first, second = moments[name]
        first += (1 - BETA_1) * (slope - first)
        second += (1 - BETA_2) * (slope**2 - second)
        unbiased = first / (1 - BETA_1**n), second / (1 - BETA_2**n)
        p[name] -= RATE * unbiased[0] / (xp.sqrt(unbiased[1]) + 1e-8)


def new_batch(rng):
    """Tokens at their places, and the tokens before them, (batch, seqlen, width) each."""
    embeddings = rng.standard_normal((TOKENS, WIDTH)).astype("f4")
    angles = np.arange(SEQLEN)[:, None] / 100 ** (np.arange(WIDTH // 2) / (WIDTH // 2))
    places = np.concatenate([np.sin(angles), np.cos(angles)], -1).astype("f4")
    tokens = embeddings[rng.integers(0, TOKENS, (BATCH, SEQLEN))]
    before = np.concatenate([np.zeros_like(tokens[:, :1]), tokens[:, :-1]], 1)
    return xp.asarray(tokens + places), xp.asarray(before)


@command
def main() -> int:
    """Train, print the loss of each step; 1 if it has not fallen to a half."""
    rng = np.random.default_rng(0)
    p, (x, target) = new_parameters(rng), new_batch(rng)
    moments = {name: (xp.zeros_like(each), xp.zeros_like(each)) for name, each in p.items()}
    losses = []
    for n in range(1, STEPS + 1):
        loss, g = loss_and_gradients(p, x, target)
        step(p, g, moments, n)
        losses.append(loss)
        print(f"step {n:2}: loss {loss:.3f}")
    return int(not losses[-1] < losses[0] / 2)


if __name__ == "__main__":
    sys.exit(main())
