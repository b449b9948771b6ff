"""The walk of a role through the buffers of K and V, as `numflash.kernels.wgmma.ring` has it."""

from numflash.configs import Sm90ForwardConfig


class Ring:
    """Where a role is.

    Attributes:
        tile: the number of stages before, of all walks.
        k, v: the buffers of this stage.
    """

    def __init__(self, config: Sm90ForwardConfig):
        self._k_stages, self._v_stages = config.num_stages, config.stages_of_v
        self.tile = 0

    @property
    def k(self) -> int:
        """The buffer of K."""
        return self.tile % self._k_stages

    @property
    def v(self) -> int:
        """The buffer of V."""
        return self.tile % self._v_stages

    def advance(self) -> None:
        """To the next stage."""
        self.tile += 1
