"""numflash.explain_dispatch: which kernels a call runs, and why not the others."""

from dataclasses import dataclass

from numflash.arrays import library_of
from numflash.calls import problem_of
from numflash.dispatch import Choice, Geometry
from numflash.selection import backward_choices, combine_choice, forward_choice, split_configs
from numflash.views import ArrayView


@dataclass(frozen=True)
class Explanation:
    """The kernels of one problem; `print` shows them with the reasons.

    Attributes:
        forward: the kernel of `attention`.
        geometry: how the forward is laid over the machine; all ones for a portable kernel.
        combine: the kernel that puts the parts of split keys together; None without splits.
        backward: the kernels of `attention_backward`, by family.
    """

    forward: Choice
    geometry: Geometry
    combine: Choice | None
    backward: dict[str, Choice]

    def __str__(self) -> str:
        lines = [str(self.forward)]
        if self.geometry.pack > 1:
            lines.append(
                f"  {self.geometry.pack} query heads of a group are packed into the rows of a tile"
            )
        if self.geometry.num_splits > 1:
            lines.append(f"  the keys are split over {self.geometry.num_splits} blocks")
        others = [self.combine] if self.combine is not None else []
        return "\n".join([*lines, *map(str, [*others, *self.backward.values()])])


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
    forward_configs, backward_configs = split_configs(options.pop("config", None))
    views = {name: _view(name, x) for name, x in (("q", q), ("k", k), ("v", v))}
    if options.get("alibi_slopes") is not None:
        views["alibi_slopes"] = _view("alibi_slopes", options["alibi_slopes"])
    problem, traits, device = problem_of(views, options)
    forward, geometry = forward_choice(
        problem, traits, device, forward_configs.get("forward"), runs=False
    )
    combine = None
    if geometry.num_splits > 1:
        combine = combine_choice(
            problem, traits, device, forward_configs.get("combine"), runs=False
        )
    backward = backward_choices(problem, traits, device, backward_configs, runs=False)
    return Explanation(forward, geometry, combine, backward)


def _view(name: str, array) -> ArrayView:
    return library_of(array, name).view(array, name)
