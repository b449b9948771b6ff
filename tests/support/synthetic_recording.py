"""An exhaustive run that no GPU has made: times that the model does not know, for tests only."""

import itertools
import random

from tuner import model
from tuner.measuring.replay import Recording
from tuner.records import Record, ResourceUsage
from tuner.space.configs import Space


def recording_of(space: Space, seed: int) -> Recording:
    """An exhaustive run whose times are not the model's.

    Each choice, and each pair of choices, is better or worse than the model knows, and every
    config a little for itself.
    """
    random_of = random.Random(seed)
    factors: dict = {}
    records = {}
    machine, problem = space.machine, space.problem
    for config, values in space.feasible.items():
        ms = model.estimate(machine, problem, config).ms * random_of.uniform(0.98, 1.02)
        for item in values.items():
            ms *= factors.setdefault(item, random_of.uniform(0.9, 1.12))
        for pair in itertools.combinations(values.items(), 2):
            ms *= factors.setdefault(pair, random_of.uniform(0.97, 1.03))
        samples = tuple(ms * random_of.uniform(0.995, 1.01) for _ in range(9))
        smem = config.smem_bytes(problem.traits)
        resources = ResourceUsage(128, 0, smem, config.num_threads, 2, "registers")
        records[str(config)] = Record(
            str(config), "measured", resources=resources, samples_ms=samples, seconds=1.0
        )
    device = {"name": machine.name, "arch": machine.arch, "num_sms": machine.num_sms}
    return Recording(device, problem, {}, records)
