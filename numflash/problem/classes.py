"""ProblemClass: the problems that one tuned config serves.

Two problems are of one class if the same kernel is compiled for them, their masks are of one kind,
and their sizes round up to the same powers of two.
"""

import re
from dataclasses import dataclass

from numflash.configs import FAMILIES, Traits
from numflash.problem.problem import AttentionProblem

# Beyond these a kernel's speed no longer depends on the size.
_MAX_SEQLEN = 2**17
_MAX_BATCH_HEADS = 2**12
_PATTERN = re.compile(
    r"(?P<family>[a-z-]+) (?P<traits>\S+) (?P<mask>full|causal|window[1-9]\d*) "
    r"q(?P<seqlen_q>\d+) k(?P<seqlen_k>\d+) bh(?P<batch_heads>\d+) g(?P<group_size>\d+)"
    r"(?: p(?P<page_size>[1-9]\d*))?",
    re.ASCII,
)


@dataclass(frozen=True)
class ProblemClass:
    """The problems that one tuned config serves.

    String form: `forward float16-d64-dv64-vec causal q4096 k4096 bh64 g1`, and of pages of a cache
    ` p16` behind it.

    Attributes:
        family: the kernel, one of `configs.FAMILIES`.
        traits: what the kernel is compiled for.
        mask: "full"; "causal": some keys after a query are hidden; or "window256": keys before it
            too, and it sees at most so many, a power of two.
        seqlen_q, seqlen_k, batch_heads, group_size: rounded up to powers of two; batch_heads is
            batch * num_heads_q, group_size the query heads that share a head of K and V. Of
            sequences with lengths of their own, which lie on the device, the seqlens are the
            means of packed arrays, or what padded arrays and page tables have room for.
        page_size: keys of a page, as they are: boxes of bulk copies depend on their divisors; 0
            where K and V do not lie in pages.
    """

    family: str
    traits: Traits
    mask: str
    seqlen_q: int
    seqlen_k: int
    batch_heads: int
    group_size: int
    page_size: int = 0

    def __post_init__(self):
        if self.traits.paged != (self.page_size > 0):
            raise ValueError(
                "a class has a page_size where its kernels read pages, and only there, got "
                f"{self.page_size} with {self.traits}"
            )

    def __str__(self) -> str:
        pages = f" p{self.page_size}" if self.page_size else ""
        return (
            f"{self.family} {self.traits} {self.mask} q{self.seqlen_q} k{self.seqlen_k} "
            f"bh{self.batch_heads} g{self.group_size}{pages}"
        )

    @classmethod
    def of(cls, family: str, problem: AttentionProblem, traits: Traits) -> "ProblemClass":
        """The class of a problem."""
        sizes, band = (problem.tokens_q, problem.tokens_k), (problem.band_lo, problem.band_hi)
        if problem.lengths is not None:
            # As that of a sequence of just these sizes.
            moved = problem.aligned * (problem.tokens_k - problem.tokens_q)
            band = tuple(side + moved for side in band)
        return cls(
            family,
            traits,
            mask_kind(*band, *sizes),
            round_up(problem.tokens_q, _MAX_SEQLEN),
            round_up(problem.tokens_k, _MAX_SEQLEN),
            round_up(problem.entries * problem.num_heads_q, _MAX_BATCH_HEADS),
            round_up(problem.group_size, _MAX_BATCH_HEADS),
            problem.pages.size if traits.paged else 0,
        )

    @classmethod
    def parse(cls, text: str) -> "ProblemClass":
        """The inverse of `str`. Raises ValueError for anything else."""
        match = _PATTERN.fullmatch(text)
        if match is not None and match["family"] in FAMILIES:
            fields = match.groupdict()
            sizes = ("seqlen_q", "seqlen_k", "batch_heads", "group_size")
            found = cls(
                fields["family"],
                Traits.parse(fields["traits"]),
                fields["mask"],
                *(int(fields[name]) for name in sizes),
                int(fields["page_size"] or 0),
            )
            if str(found) == text:
                return found
        raise ValueError(
            "a problem class must look like 'forward float16-d64-dv64-vec causal q4096 k4096 "
            f"bh64 g1', got {text!r}"
        )

    @property
    def window(self) -> int | None:
        """The most keys that a query sees; None if no window limits them."""
        return int(self.mask.removeprefix("window")) if self.mask.startswith("window") else None


def round_up(n: int, most: int = _MAX_SEQLEN) -> int:
    """The next power of two, at most `most`: what a class keeps of a size."""
    return min(1 << max(0, n - 1).bit_length(), most)


def mask_kind(band_lo: int, band_hi: int, seqlen_q: int, seqlen_k: int) -> str:
    """The kind of a mask, by the keys that it hides, not by the options that asked for it.

    Query i sees the keys j with band_lo <= j - i <= band_hi.
    """
    if band_lo > 1 - seqlen_q:
        return f"window{round_up(max(1, band_hi - band_lo + 1))}"
    return "causal" if band_hi < seqlen_k - 1 else "full"
