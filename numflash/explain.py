"""numflash.explain_dispatch: which kernels a call runs, and why not the others."""

from dataclasses import dataclass

from numflash import api
from numflash.arrays import library_of
from numflash.dispatch import Choice, Geometry
from numflash.views import ArrayView


@dataclass(frozen=True)
class Explanation:
    """The kernels of one problem; `print` shows them with the reasons.

    Attributes:
        forward: the kernel of `attention`.
        geometry: how the forward is laid over the machine; all ones for a portable kernel.
        backward: the kernels of `attention_backward`, by family.
    """

    forward: Choice
    geometry: Geometry
    backward: dict[str, Choice]

    def __str__(self) -> str:
        lines = [str(self.forward)]
        if self.geometry.pack > 1:
            lines.append(
                f"  {self.geometry.pack} query heads of a group are packed into the rows of a tile"
            )
        if self.geometry.num_splits > 1:
            lines.append(f"  the keys are split over {self.geometry.num_splits} blocks")
        return "\n".join([*lines, *map(str, self.backward.values())])


def explain_dispatch(q, k, v, **options) -> Explanation:
    """Say which kernels and configs `attention` and `attention_backward` would run.

    Args:
        q, k, v: as for `numflash.attention`; only their metadata matters.
        options: the options of `numflash.attention`, without out, stream and return_lse. `config`
            may be a dictionary that also names configs for the backward, by family.

    Returns:
        The chosen kernels. `str` lists, below each, every other candidate and why it will not run.

    Raises:
        TypeError, ValueError, UnsupportedError: as `numflash.attention`.
    """
    configs = options.pop("config", None)
    configs = dict(configs) if isinstance(configs, dict) else {"forward": configs}
    forward_config = configs.pop("forward", None)
    views = {name: _view(name, x) for name, x in (("q", q), ("k", k), ("v", v))}
    if options.get("alibi_slopes") is not None:
        views["alibi_slopes"] = _view("alibi_slopes", options["alibi_slopes"])
    problem, traits, device = api.problem_of(views, options)
    choice, geometry = api.forward_choice(problem, traits, device, forward_config)
    forced = api.backward_configs(configs or None)
    families = (api.FUSED,) if api.FUSED in forced else api.BACKWARD
    backward = {
        family: api.backward_choice(family, problem, traits, device, forced.get(family))
        for family in families
    }
    return Explanation(choice, geometry, backward)


def _view(name: str, array) -> ArrayView:
    return library_of(array, name).view(array, name)
