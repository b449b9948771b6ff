"""Errors of the simulator."""


class DeadlockError(RuntimeError):
    """Threads of a block wait for others that will never come."""


class SimulationError(RuntimeError):
    """A kernel did what the hardware leaves undefined."""
