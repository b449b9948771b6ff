"""Writes minilm_layer.npz: what one attention layer of a trained encoder computes on real English.

Run from anywhere, with NumPy and the model's package installed (see ../minilm.py):

    python examples/data/make_minilm_activations.py

Both texts are cut to the same number of tokens, so that the arrays hold no padding and full
attention without a mask is the right answer. q, k and v are rounded to float16 before every
attention, as a half-precision kernel would receive them, and stored so: they are exact inputs in
every wider type. `out` is their attention in float64, rounded once to float32, and the model goes
on with it.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import minilm

PATH = Path(__file__).resolve().parent / "minilm_layer.npz"
LAYER = 3
# 64 + 8 + 1: no tile of 8 rows or more divides it.
SEQLEN = 73
# Public domain: Moby-Dick (1851) and On the Origin of Species (1859).
MELVILLE = (
    "Call me Ishmael. Some years ago - never mind how long precisely - having little or no money"
    " in my purse, and nothing particular to interest me on shore, I thought I would sail about a"
    " little and see the watery part of the world. It is a way I have of driving off the spleen"
    " and regulating the circulation. Whenever I find myself growing grim about the mouth;"
    " whenever it is a damp, drizzly November in my soul"
)
DARWIN = (
    "It is interesting to contemplate an entangled bank, clothed with many plants of many kinds,"
    " with birds singing on the bushes, with various insects flitting about, and with worms"
    " crawling through the damp earth, and to reflect that these elaborately constructed forms,"
    " so different from each other, and dependent on each other in so complex a manner, have all"
    " been produced by laws acting around us."
)


def record_layers(model: minilm.MiniLM, token_ids: np.ndarray) -> list[dict[str, np.ndarray]]:
    """q, k, v (float16) and out (float32) of every layer for token ids (batch, seqlen)."""
    layers = []

    def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        q, k, v = (x.astype(np.float16) for x in (q, k, v))
        out = minilm.softmax_attention(*(x.astype(np.float64) for x in (q, k, v)))
        layers.append({"q": q, "k": k, "v": v, "out": out.astype(np.float32)})
        return layers[-1]["out"]

    model.forward(token_ids, attention)
    return layers


def check(path: Path) -> None:
    """Compare the stored `out`, row by row, with softmax(q k^T * softmax_scale) v in float64.

    Raises:
        ValueError: a row is further away than one rounding to float32.
    """
    with np.load(path) as stored:
        q, k, v, out = (stored[name].astype(np.float64) for name in ("q", "k", "v", "out"))
        softmax_scale = float(stored["softmax_scale"])
    for b, row, h in np.ndindex(q.shape[:3]):
        probabilities = np.exp(k[b, :, h] @ q[b, row, h] * softmax_scale)
        exact = probabilities @ v[b, :, h] / probabilities.sum()
        # Half a unit in float32's last place, and a sliver for the two float64 sums.
        if not np.all(np.abs(out[b, row, h] - exact) <= 2**-24 * np.abs(exact) + 1e-13):
            raise ValueError(f"out[{b}, {row}, {h}] is not the attention of the stored q, k, v")


def main() -> None:
    """Write the file, then check it."""
    model = minilm.load_model()
    texts = (MELVILLE, DARWIN)
    token_ids = np.array([model.tokenize(text, SEQLEN) for text in texts], dtype=np.int32)
    np.savez_compressed(
        PATH,
        **record_layers(model, token_ids)[LAYER],
        softmax_scale=np.float64(minilm.HEAD_DIM**-0.5),
        layer=np.int64(LAYER),
        texts=np.array(texts),
        token_ids=token_ids,
    )
    check(PATH)
    print(f"{PATH}: {PATH.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
