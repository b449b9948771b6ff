"""Numba's compiler without the work that it repeats.

A kernel is some thirty device functions, each compiled by itself. Two things that Numba does in
all of them take a third of the time from Python to LTO-IR, and the machine code does not depend
on whether they are done again:

* For each operation and each call it asks which signature `+`, an array's element or an
  instruction has for the argument types, by trying overload after overload, when it infers types
  and again when it lowers. The answers are the same in every function: they are remembered.
* After nearly every pass it computes which variables are live at the start of each block. Only
  generators are asked for that: for other functions it is left out.

`without_repeated_work` changes Numba for the time of a compilation. Where Numba's internals are
not those described here, it stays as it is, and merely slower.
"""

from contextlib import ExitStack, contextmanager
from weakref import WeakKeyDictionary

from numba import types

# Names in PostProcessor.run, where leaving out the live variables is known to be right.
_KNOWN_NAMES = {
    "transforms",
    "canonicalize_cfg",
    "func_ir",
    "blocks",
    "VariableLifetime",
    "variable_lifetime",
    "analysis",
    "compute_live_variables",
    "cfg",
    "usedefs",
    "defmap",
    "deadmaps",
    "combined",
    "items",
    "block_entry_vars",
    "is_generator",
    "GeneratorInfo",
    "generator_info",
    "_compute_generator_info",
    "_insert_var_dels",
}

# function type -> (types of arguments, of keyword arguments) -> signature. Weak, because Numba
# makes a new function type for each `float32` that a function calls.
_signatures = WeakKeyDictionary()


@contextmanager
def without_repeated_work():
    """A context in which compiling repeats less work."""
    with ExitStack() as changes:
        for change in (_remember_signatures, _leave_out_live_variables):
            try:
                owner, name, replacement = change()
            except (ImportError, AttributeError):
                continue
            changes.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, replacement)
        yield


def _remember_signatures() -> tuple:
    from numba.cuda.descriptor import cuda_target

    typing_context = cuda_target.typing_context
    defining = (c for c in types.Function.__mro__ if "get_call_type" in vars(c))
    functions = next(defining, None)
    resolve = functions.get_call_type

    def get_call_type(self, context, args, kws):
        if context is not typing_context:
            return resolve(self, context, args, kws)
        # `self` stands for its overloads too: with another one registered it is another type.
        known = _signatures.setdefault(self, {})
        key = tuple(args), tuple(kws.items())
        if key not in known:
            known[key] = resolve(self, context, args, kws)
        return known[key]

    return functions, "get_call_type", get_call_type


def _leave_out_live_variables() -> tuple:
    from numba.cuda.core import postproc

    run = postproc.PostProcessor.run
    if set(run.__code__.co_names) != _KNOWN_NAMES:
        raise AttributeError("PostProcessor.run does something else")

    def run_without(self, emit_dels=False, extend_lifetimes=False):
        function = self.func_ir
        if function.is_generator:
            return run(self, emit_dels, extend_lifetimes)
        function.blocks = postproc.transforms.canonicalize_cfg(function.blocks)
        function.variable_lifetime = postproc.VariableLifetime(function.blocks)
        function.generator_info = None
        if emit_dels:
            self._insert_var_dels(extend_lifetimes=extend_lifetimes)

    return postproc.PostProcessor, "run", run_without
