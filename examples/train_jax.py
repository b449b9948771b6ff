"""Train a small transformer with JAX: jit, grad and vmap go through numflash's attention.

It learns to recall: after pairs of a letter and a digit comes a letter again, and the model is to
say its digit, which only attention can look up. On a GPU that JAX sees:

    python examples/train_jax.py

Without one, with NUMBA_ENABLE_CUDASIM=1 before it: kernels then run in the simulator, on JAX's CPU
platform, and a smaller training takes less than a minute.
"""

import sys

import jax
import jax.numpy as jnp

import numflash
import numflash.jax
from numflash.runtime.commands import command

if numflash.simulating():
    LETTERS, DIGITS, PAIRS, HEADS, BATCH, STEPS = 3, 3, 5, 1, 4, 12
else:
    LETTERS, DIGITS, PAIRS, HEADS, BATCH, STEPS = 8, 8, 24, 4, 64, 300
SEQLEN = 2 * PAIRS + 1
HEAD_DIM, RATE = 16, 0.03
WIDTH = HEADS * HEAD_DIM


def problems(key, count):
    """Pairs of letters and digits, a letter that was among them, and the digit after it."""
    of_letters, of_digits, of_asked = jax.random.split(key, 3)
    letters = jax.random.randint(of_letters, (count, PAIRS), 0, LETTERS)
    # A letter has the same digit all along.
    digits = jax.random.randint(of_digits, (count, LETTERS), 0, DIGITS)
    asked = letters[jnp.arange(count), jax.random.randint(of_asked, (count,), 0, PAIRS)]
    found = jnp.take_along_axis(digits, letters, 1)
    pairs = jnp.stack([letters, LETTERS + found], -1).reshape(count, 2 * PAIRS)
    return jnp.concatenate([pairs, asked[:, None]], 1), digits[jnp.arange(count), asked]


def parameters(key):
    """Of one layer."""
    shapes = {
        "tokens": (LETTERS + DIGITS, WIDTH),
        "before": (LETTERS + DIGITS, WIDTH),
        "qkv": (WIDTH, 3 * WIDTH),
        "out": (WIDTH, WIDTH),
        "logits": (WIDTH, DIGITS),
    }
    keys = jax.random.split(key, len(shapes))
    made = {
        name: jax.random.normal(k, shape) * shape[0] ** -0.5
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return made | {"slopes": jnp.full(HEADS, 0.05)}


def predict(of, tokens):
    """Logits of the digit for one sequence; `vmap` makes it those of a batch."""
    # A token also says which one came before it, so that a digit can be found by its letter.
    before = jnp.pad(of["before"][tokens[:-1]], ((1, 0), (0, 0)))
    x = of["tokens"][tokens] + before
    q, k, v = (x @ of["qkv"]).reshape(SEQLEN, 3, HEADS, HEAD_DIM).swapaxes(0, 1).astype("bfloat16")
    seen = numflash.jax.attention(q, k, v, causal=True, alibi_slopes=of["slopes"])
    x = x + jax.nn.gelu(seen.reshape(SEQLEN, WIDTH)) @ of["out"]
    return x[-1] @ of["logits"]


def loss_of(of, tokens, digits):
    """Cross entropy."""
    logits = jax.vmap(predict, (None, 0))(of, tokens)
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), digits[:, None], 1).mean()


@jax.jit
def step(of, moments, number, key):
    """One step of Adam."""
    loss, gradients = jax.value_and_grad(loss_of)(of, *problems(key, BATCH))
    first, second = moments
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradients)
    second = jax.tree.map(lambda m, g: 0.99 * m + 0.01 * g * g, second, gradients)
    of = jax.tree.map(
        lambda x, m, n: (
            x - RATE * (m / (1 - 0.9**number)) / (jnp.sqrt(n / (1 - 0.99**number)) + 1e-8)
        ),
        of,
        first,
        second,
    )
    return of, (first, second), loss


@command
def main() -> int:
    """Train, and print the loss; 0 if it falls."""
    key = jax.random.key(0)
    of = parameters(key)
    zeros = jax.tree.map(jnp.zeros_like, of)
    moments, losses = (zeros, zeros), []
    for number in range(1, STEPS + 1):
        of, moments, loss = step(of, moments, number, jax.random.fold_in(key, number))
        losses.append(float(loss))
        if number == 1 or number % (STEPS // 6) == 0:
            print(f"step {number:3d}: loss {losses[-1]:.3f}")
    first, last = (sum(some) / len(some) for some in (losses[:3], losses[-3:]))
    falls = last < 0.9 * first
    print(f"from {first:.3f} to {last:.3f}", "ok" if falls else "WRONG", sep="  ")
    return 0 if falls else 1


if __name__ == "__main__":
    sys.exit(main())
