"""The seed of the simulator's thread order: NUMFLASH_SIM_SEED, or 0."""

import os


class _Seed:
    """Holds the seed; tests give each test its own."""

    def __init__(self):
        text = os.environ.get("NUMFLASH_SIM_SEED") or "0"
        try:
            self.value = int(text)
        except ValueError:
            raise ValueError(f"NUMFLASH_SIM_SEED must be an integer, got {text!r}") from None


SEED = _Seed()
