"""Section 1, the call: what runs, why, and why nothing else does."""

from ...drawing.markup import Markup, joined, tag
from ..facts.call import CallFacts, KernelFacts
from ..numbers import Number


def facts_of(facts: CallFacts, name: str) -> Markup:
    """The tiles of figures that a page begins with; of its kernels that of this name."""
    (kernel,) = (kernel for kernel in facts.kernels if kernel.name == name)
    call = ", ".join([facts.dtype, facts.mask, *facts.options])
    entries = [
        ("GPU", tag("b", facts.gpu), f"{facts.num_sms} SMs, {facts.arch}, {facts.clock}"),
        ("call", tag("b", _sizes(facts.shape)), call),
        ("kernel", tag("code", kernel.config), kernel.implementation),
    ]
    if kernel.measured is not None:
        entries.append(("measured", tag("b", with_origin(kernel.measured)), "when it was tuned"))
    if kernel.predicted is not None:
        bound = f"bound by {kernel.bound_by}"
        entries.append(("predicted", tag("b", with_origin(kernel.predicted)), bound))
    if facts.floor is not None and name == "forward":
        entries.append(("at least", tag("b", with_origin(facts.floor)), "on this GPU, any kernel"))
    if kernel.blocks_per_sm is not None:
        limit = f"limited by {kernel.limited_by}"
        entries.append(("blocks an SM", tag("b", with_origin(kernel.blocks_per_sm)), limit))
    return tag(
        "dl",
        *(
            tag("div", tag("dt", name), tag("dd", value, " ", tag("span", more, class_="muted")))
            for name, value, more in entries
        ),
        class_="facts",
    )


def _sizes(shape: dict[str, Number]) -> str:
    """Batch, tokens, heads and columns; keys and V where they are other than queries and K."""
    text = f"{shape['batch']} x {shape['seqlen_q']}"
    if shape["seqlen_k"] != shape["seqlen_q"]:
        text += f" queries, {shape['seqlen_k']} keys"
    text += f" x {shape['num_heads_q']}"
    if shape["num_heads_kv"] != shape["num_heads_q"]:
        text += f" heads, {shape['num_heads_kv']} of K and V,"
    text += f" x {shape['head_dim']}"
    return text if shape["head_dim_v"] == shape["head_dim"] else f"{text}, V {shape['head_dim_v']}"


def with_origin(number: Number) -> Markup:
    """A number with the word that says where it is from."""
    return joined([str(number), " ", tag("small", number.origin, class_="origin")])


def kernels(facts: CallFacts) -> Markup:
    """Each kernel with its rule, and folded the reasons against all others."""
    return tag("div", *map(_kernel, facts.kernels))


def _kernel(kernel: KernelFacts) -> Markup:
    about = [tag("b", kernel.name), " ", tag("code", kernel.config), f" {kernel.rule}"]
    if kernel.predicted is not None:
        about += [": ", with_origin(kernel.predicted)]
    contents: list[object] = [tag("p", *about)]
    contents += [tag("p", f"{text}.", class_="muted") for text in kernel.next_limits]
    if kernel.no_code:
        contents.append(tag("p", f"By formula: {kernel.no_code}.", class_="muted"))
    if kernel.passed_over:
        rows = [tag("tr", tag("td", what), tag("td", why)) for what, why in kernel.passed_over]
        head = tag("tr", tag("th", "kernel"), tag("th", "why not"))
        others = "another" if len(rows) == 1 else f"{len(rows)} others"
        table = tag("div", tag("table", head, *rows), class_="scroll")
        contents.append(tag("details", tag("summary", f"Why not {others}"), table))
    return tag("div", *contents, class_="kernel")
