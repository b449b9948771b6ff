"""Parts of a block that only some kernels need, each made when it is first asked for."""


class Part:
    """Something a block has one of, reached by `Block.part`."""

    def __init__(self, block):
        self.block = block

    def advance(self) -> bool:
        """Make progress that no thread makes, when none can run; whether there was any."""
        return False

    def returned(self, thread) -> None:
        """A thread of the block has returned."""

    def report(self) -> list[str]:
        """Lines of a deadlock's message: who waits here for what."""
        return []

    def finish(self) -> None:
        """All threads have returned. Raises SimulationError where something is left over."""
