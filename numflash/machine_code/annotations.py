"""What Numba cannot say of a kernel, and NVVM reads: attributes and annotations of its function.

Numba makes the LLVM function of a kernel and compiles it at once. In between it fixes the
function, and whatever is in a `changed_kernels` changes it there.
"""

from collections.abc import Callable
from contextlib import contextmanager

from llvmlite import ir
from numba.cuda import compiler


@contextmanager
def changed_kernels(change: Callable[[ir.Function], None]):
    """Compile kernels whose function `change` has had in its hands."""
    fix_kernel = compiler.kernel_fixup

    def fix_and_change(kernel, *args, **kwargs):
        fix_kernel(kernel, *args, **kwargs)
        change(kernel)

    compiler.kernel_fixup = fix_and_change
    try:
        yield
    finally:
        compiler.kernel_fixup = fix_kernel


def annotate(kernel: ir.Function, properties: dict[str, int | list[int]]) -> None:
    """Add a node to `nvvm.annotations`: properties of a kernel, each a number or a list of them.

    Source: NVVM IR Specification, "Global Property Annotation".
    """
    module, number = kernel.module, ir.IntType(32)
    node = [kernel]
    for name, value in properties.items():
        node.append(ir.MetaDataString(module, name))
        if isinstance(value, list):
            node.append(module.add_metadata([ir.Constant(number, each) for each in value]))
        else:
            node.append(ir.Constant(number, value))
    module.get_named_metadata("nvvm.annotations").add(module.add_metadata(node))
