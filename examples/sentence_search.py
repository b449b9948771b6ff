"""Finds the sentences closest in meaning to a query, with numflash as the encoder's attention.

Without a GPU (Numba's simulator, half a minute), or on one (CuPy):

    NUMBA_ENABLE_CUDASIM=1 python examples/sentence_search.py
    python examples/sentence_search.py "where can I get something to eat?"

Every sentence is encoded twice, with `numflash.attention` and with the float64 reference in all
6 layers. Exit status: 0 if both agree, 1 if the embeddings or the rankings differ, 2 if the
model's package is not installed, or there is neither a GPU nor the simulator.
"""

import argparse
import sys
import time

import gpu
import minilm
import numpy as np

from numflash.runtime.commands import command

QUERY = "How do I keep my houseplants healthy?"
SENTENCES = (
    "Water the ferns once a week and keep them out of direct sun.",
    "Yellow leaves often mean that the roots are too wet.",
    "The night train to Vienna leaves from platform nine.",
    "A small bakery on the corner sells warm rolls at dawn.",
    "The telescope found a planet circling a faint red star.",
)
# In every layer a float32 sum of n terms errs by about sqrt(n) roundings of 2**-24; n is at
# most head_dim + seqlen (one score, then one output). LayerNorm keeps the scale, so layers add up.
TOLERANCE = minilm.NUM_LAYERS * (minilm.HEAD_DIM + minilm.MAX_TOKENS) ** 0.5 * 2**-24


def numflash_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """`numflash.attention` on NumPy arrays: as they are in the simulator, else by way of a GPU."""
    import numflash

    if numflash.simulating():
        return numflash.attention(q, k, v)
    import cupy

    return cupy.asnumpy(numflash.attention(*(cupy.asarray(x) for x in (q, k, v))))


def reference_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The float64 specification, rounded to float32 once."""
    from numflash import reference

    out, _ = reference.attention(*(x.astype(np.float64) for x in (q, k, v)))
    return out.astype(np.float32)


@command
def main() -> int:
    """Encode, rank, print and compare; the exit status."""
    parser = argparse.ArgumentParser(description="Rank a few sentences by closeness to a query.")
    parser.add_argument("query", nargs="?", default=QUERY)
    query = parser.parse_args().query
    if (why := gpu.why_not()) is not None:
        print(why, file=sys.stderr)
        return 2
    try:
        model = minilm.load_model()
    except ModuleNotFoundError as error:
        print(error, file=sys.stderr)
        return 2

    # Said first: in the simulator the rest takes a while.
    print(f"Query: {query}\n", flush=True)
    texts = (query, *SENTENCES)
    embeddings, seconds = [], []
    for attention in (numflash_attention, reference_attention):
        start = time.perf_counter()
        embeddings.append(model.encode(texts, attention))
        seconds.append(time.perf_counter() - start)
    scores, reference_scores = (e[1:] @ e[0] for e in embeddings)
    ranking = np.argsort(-scores)

    print("rank  cosine  sentence")
    for rank, index in enumerate(ranking, start=1):
        print(f"{rank:4}  {scores[index]:6.3f}  {SENTENCES[index]}")

    difference = np.abs(embeddings[0] - embeddings[1]).max()
    print(f"\nencoded in {seconds[0]:.1f} s with numflash, {seconds[1]:.1f} s with the reference")
    print(f"largest difference between the embeddings: {difference:.1e} (limit {TOLERANCE:.1e})")
    # Written so that a NaN fails too.
    if not difference <= TOLERANCE:
        print("numflash and the reference disagree beyond float32 rounding", file=sys.stderr)
        return 1
    if not np.array_equal(ranking, np.argsort(-reference_scores)):
        print("numflash and the reference rank the sentences differently", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
