"""The seed of the simulator's thread order: NUMFLASH_SIM_SEED, or 0."""

import os


class _Seed:
    """Holds the seed; tests give each test its own."""

    def __init__(self):
        self.value = int(os.environ.get("NUMFLASH_SIM_SEED", "0"))


SEED = _Seed()
