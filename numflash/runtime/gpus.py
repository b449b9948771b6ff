"""GPUs that need not be here: the sizes that kernels are chosen by, by name or architecture.

A `Gpu` may stand where the ordinal of a CUDA device is asked for, as far as nothing runs on it.
The table is `gpus.toml`.
"""

import difflib
import re
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from numflash.runtime.devices import Architecture, architecture

_MB = 2**20
# "sm_89", "sm89", "89", "sm_90a"
_ARCHITECTURE = re.compile(r"(?:sm_?)?(\d{2,3}[af]?)", re.IGNORECASE)
# Words that people leave out of a GPU's name.
_BRANDS = re.compile(r"nvidia|geforce|tesla|rtx|[^a-z0-9]")


@dataclass(frozen=True)
class Gpu:
    """A GPU that is only known by name.

    Attributes:
        name: the driver's, "NVIDIA H200"; or an architecture's own, "sm_90".
        limits: of its architecture.
        num_sms: multiprocessors.
        l2_bytes: L2 cache.
        sizes_of: the GPU whose num_sms and l2_bytes these are; not `name` where only an
            architecture is known.
    """

    name: str
    limits: Architecture
    num_sms: int
    l2_bytes: int
    sizes_of: str

    @property
    def is_architecture(self) -> bool:
        """Whether the sizes are assumed."""
        return self.name != self.sizes_of

    def __str__(self) -> str:
        sizes = f"{self.num_sms} SMs and {self.l2_bytes / _MB:g} MB of L2"
        if self.is_architecture:
            return f"{self.limits.arch}, as if it had the {sizes} of {self.sizes_of}"
        return f"{self.name}: {self.limits.arch}, {sizes}"


def find(name: str, option: str = "arch") -> Gpu:
    """The GPU with this name, in any case and with or without its brand ("h200"), or "sm_90".

    Args:
        name: of the GPU or architecture.
        option: the caller's name for it, for messages.

    Raises:
        TypeError: not a string.
        ValueError: nothing has this name; the message names those that are spelled alike.
    """
    if not isinstance(name, str):
        raise TypeError(
            f'{option} must be an architecture, as in "sm_90", or the name of a GPU, got {name!r} '
            f"({type(name).__name__})"
        )
    text = name.strip()
    if match := _ARCHITECTURE.fullmatch(text):
        return _of_architecture(architecture(f"sm_{match[1].lower()}"))
    by_key, key = _by_key(), _key(text)
    if key in by_key:
        return by_key[key]
    near = difflib.get_close_matches(key, by_key, n=8, cutoff=0.5)
    names = list(dict.fromkeys(by_key[k].name for k in near))[:4]
    hint = f"; did you mean {' or '.join(names)}?" if names else ""
    raise ValueError(
        f'{option} must be an architecture, as in "sm_90", or the name of a GPU, as in '
        f'"NVIDIA H200", '
        f"got {name!r}{hint}"
    )


def names() -> list[str]:
    """The names of all GPUs in the table, oldest architecture first."""
    return [row["name"] for row in _table()["gpus"]]


def _of_architecture(limits: Architecture) -> Gpu:
    """An architecture by itself, with the sizes of the newest GPU that is not newer."""
    representatives = {
        architecture(arch).compute_capability: name
        for arch, name in _table()["representatives"].items()
    }
    newest = max(cc for cc in representatives if cc <= limits.compute_capability)
    like = _by_key()[_key(representatives[newest])]
    name = limits.arch.rstrip("af")
    return Gpu(name, limits, like.num_sms, like.l2_bytes, sizes_of=like.name)


@cache
def _table() -> dict:
    return tomllib.loads(
        files("numflash.runtime").joinpath("gpus.toml").read_text(encoding="utf-8")
    )


@cache
def _by_key() -> dict[str, Gpu]:
    """Every spelling that is understood -> its GPU."""
    found = {}
    for row in _table()["gpus"]:
        name, limits = row["name"], architecture(row["arch"])
        gpu = Gpu(name, limits, row["num_sms"], int(row["l2_mb"] * _MB), sizes_of=name)
        for spelling in (name, *row.get("aliases", ())):
            found[_key(spelling)] = gpu
    return found


def _key(name: str) -> str:
    """A name without case, brand, blanks and punctuation."""
    return _BRANDS.sub("", name.lower())
