"""Text generation with a paged cache: requests come and go, and share every decoding step.

    python examples/generate.py

A tiny decoder-only transformer with random weights, in NumPy in the simulator and in CuPy on a
GPU. Its cache of keys and values is a pool of pages for all requests. A request takes pages when
its tokens need them, from wherever they are free, and gives them back when it has ended:

    prefill     the prompt's tokens at once: attention_with_kvcache with several new tokens
    decoding    one token of each running request: a batch of sequences of different lengths

At the end each request's tokens are compared with those of attention without a cache, over the
whole sequence. They are the same.
"""

import sys
from dataclasses import dataclass, field

import numpy as np

import numflash
from numflash.runtime.commands import command

if numflash.simulating():
    xp = np
else:
    import cupy as xp

VOCABULARY, WIDTH, LAYERS, HEADS, HEADS_KV, HEAD_DIM = 50, 32, 2, 4, 2, 16
PAGE, PAGES, PAGES_OF_A_REQUEST, MOST_RUNNING = 4, 12, 6, 3
POSITIONS = PAGE * PAGES_OF_A_REQUEST


@dataclass
class Request:
    """A prompt, and how many tokens to generate after it."""

    prompt: list[int]
    count: int
    arrives: int
    tokens: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    cached: int = 0

    @property
    def has_ended(self) -> bool:
        """Whether all its tokens are there."""
        return len(self.tokens) == len(self.prompt) + self.count


class Model:
    """A decoder-only transformer: norm, attention, norm, and a layer of ReLU."""

    def __init__(self, seed: int = 0):
        rng = np.random.default_rng(seed)

        def weights(rows, columns):
            return xp.asarray(rng.standard_normal((rows, columns)).astype("f4") / rows**0.5)

        self.embeddings, self.to_scores = weights(VOCABULARY, WIDTH), weights(WIDTH, VOCABULARY)
        heads = HEADS + 2 * HEADS_KV
        shapes = (WIDTH, heads * HEAD_DIM), (HEADS * HEAD_DIM, WIDTH)
        shapes += (WIDTH, 2 * WIDTH), (2 * WIDTH, WIDTH)
        self.layers = [[weights(*shape) for shape in shapes] for _ in range(LAYERS)]
        self.tables = numflash.rotary_tables(POSITIONS, HEAD_DIM, like=self.embeddings)

    def __call__(self, tokens, attend):
        """(batch, seqlen, VOCABULARY) scores of the next token.

        `attend` is called as attend(layer, q, k, v), of (batch, seqlen, heads, HEAD_DIM).
        """
        x = self.embeddings[xp.asarray(tokens)]
        batch, seqlen, _ = x.shape
        for layer, (to_qkv, from_heads, wide, narrow) in enumerate(self.layers):
            qkv = (_normed(x) @ to_qkv).reshape(batch, seqlen, -1, HEAD_DIM).astype("f2")
            q, k, v = xp.split(qkv, [HEADS, HEADS + HEADS_KV], axis=2)
            x = x + attend(layer, q, k, v).reshape(batch, seqlen, -1).astype("f4") @ from_heads
            x = x + xp.maximum(_normed(x) @ wide, 0) @ narrow
        return _normed(x) @ self.to_scores


def _normed(x):
    return x / xp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


class Server:
    """Runs requests together, with one cache of pages for each layer."""

    def __init__(self, model: Model):
        self.model, self.free = model, list(range(PAGES))[::-1]
        shape = LAYERS, 2, PAGES, PAGE, HEADS_KV, HEAD_DIM
        # A page holds whatever was there before: nobody reads it.
        self.cache = xp.full(shape, xp.nan, "f2")

    def step(self, requests: list[Request], tokens: list[list[int]]) -> list[int]:
        """Append as many tokens to each request's cache; the next token of each."""
        new = len(tokens[0])
        table = np.zeros((len(requests), PAGES_OF_A_REQUEST), np.int32)
        for row, request in zip(table, requests, strict=True):
            while len(request.pages) * PAGE < request.cached + new:
                request.pages.append(self.free.pop())
            row[: len(request.pages)] = request.pages
        lengths = np.array([request.cached for request in requests], np.int32)
        table, lengths = xp.asarray(table), xp.asarray(lengths)

        def attend(layer, q, k, v):
            return numflash.attention_with_kvcache(
                q,
                *self.cache[layer],
                k,
                v,
                cache_seqlens=lengths,
                page_table=table,
                rotary_cos=self.model.tables[0],
                rotary_sin=self.model.tables[1],
                rotary_interleaved=False,
                causal=True,
            )

        scores = self.model(tokens, attend)
        for request in requests:
            request.cached += new
        return xp.argmax(scores[:, -1], -1).tolist()

    def run(self, requests: list[Request]) -> int:
        """All requests, from their arrival to their end; the number of decoding steps."""
        waiting, running, now, steps = list(requests), [], 0, 0
        while waiting or running:
            arrived = [request for request in waiting if request.arrives <= now]
            for request in arrived:
                if len(running) < MOST_RUNNING and self._has_room(running, request):
                    waiting.remove(request)
                    running.append(request)
                    (token,) = self.step([request], [request.prompt])
                    request.tokens = [*request.prompt, token]
            going = [request for request in running if not request.has_ended]
            if going:
                last = self.step(going, [request.tokens[-1:] for request in going])
                for request, token in zip(going, last, strict=True):
                    request.tokens.append(token)
                steps += 1
            for request in running:
                if request.has_ended:
                    self.free += request.pages
            running, now = [request for request in going if not request.has_ended], now + 1
        return steps

    def _has_room(self, running: list[Request], request: Request) -> bool:
        """Whether all that run can end with the pages that there are."""
        needed = (-(-(len(r.prompt) + r.count) // PAGE) for r in (*running, request))
        return sum(needed) <= PAGES


def without_cache(model: Model, tokens: list[int]) -> list[int]:
    """The next token after each of a sequence, by attention over all of it."""

    def attend(layer, q, k, v):
        q, k = (numflash.apply_rotary(x, *model.tables) for x in (q, k))
        return numflash.attention(q, k, v, causal=True)

    return xp.argmax(model([tokens], attend)[0], -1).tolist()


@command
def main() -> int:
    """Serve some requests, and compare; the exit status."""
    rng, model = np.random.default_rng(1), Model()
    sizes = ((7, 4, 0), (3, 6, 0), (11, 2, 1), (5, 3, 2), (1, 5, 3))
    requests = [
        Request(rng.integers(0, VOCABULARY, length).tolist(), count, arrives)
        for length, count, arrives in sizes
    ]
    server = Server(model)
    steps = server.run(requests)
    assert sorted(server.free) == list(range(PAGES))
    failed = False
    for number, request in enumerate(requests):
        length = len(request.prompt)
        wanted = without_cache(model, request.tokens[:-1])[length - 1 :]
        verdict = "ok" if request.tokens[length:] == wanted else f"NOT EQUAL: {wanted}"
        print(f"request {number}: {request.prompt} -> {request.tokens[length:]}  {verdict}")
        failed |= verdict != "ok"
    total = sum(request.count for request in requests)
    print(f"{total} tokens in {len(requests)} prefills and {steps} decoding steps")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
