"""Launching: a kernel with its arguments, on the GPU or in the simulator.

`Launcher` binds a kernel to a device and to all arguments but the addresses of its arrays. On the
GPU a launch packs those addresses next to the arguments packed before and makes one driver call on
the caller's stream: no allocation, no synchronisation, capturable in a CUDA graph.

The arguments are the records of `kernels.arguments`, by parameter name; what the driver gets, or
the executor, is their leaves. A leaf that is a name is an operand: a pointer's array, or a number
that may be another one with each call, as a seed. A tensor map is passed by value. It is encoded
when an address is first bound and remembered.
"""

import ctypes
import math
import struct
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from numflash.calls.encoding import aligned, encoder
from numflash.configs import Config, Traits
from numflash.kernels.arguments import assembled, value_at
from numflash.kernels.kernel import Kernel
from numflash.machine_code.compiler import Cubin, compile_kernel, get_cubin, warn_of_spills
from numflash.machine_code.ptx_worker import ptx_of
from numflash.problem.tensor_maps import MAP_ALIGNMENT, MAP_BYTES, TensorLayout
from numflash.runtime.arrays import library_of
from numflash.runtime.driver import checked, in_context, limits_of_device, open_driver, raise_error
from numflash.runtime.mode import SIMULATED
from numflash.runtime.switches import choice
from numflash.runtime.views import FromHead, Operand, Pointer

# The code of a simulated launch: the kernel's Python, or the compilers' code of it, by the named
# route (see `compiler.executable_ptx`).
_SIMULATED_CODE = "python", "ptx", "lto"
_SLOT_BYTES = 8
# A number by its `struct` letter, with the bytes that fill up its slot.
_IN_A_SLOT = {"i": "i4x", "f": "f4x", "q": "q"}
# Encoded maps that are remembered, of each parameter of a launch: allocators use addresses again.
_MAX_MAPS = 64
_DEFAULT_SMEM_LIMIT = 48 * 1024


class Mapped(NamedTuple):
    """The argument of a tensor map: its operand, and the operand's layout."""

    operand: str
    layout: TensorLayout


class Launcher:
    """One kernel with every argument but its arrays' addresses."""

    def __init__(
        self,
        config: Config,
        traits: Traits,
        device: int,
        num_blocks: int,
        arguments: dict[str, object],
    ):
        """Say what is to be launched; nothing is compiled before `build`.

        Args:
            config, traits: which kernel.
            device: ordinal of the CUDA device.
            num_blocks: blocks of the grid; with none nothing is compiled, and nothing launched.
            arguments: by parameter name: a record, a number, a `Mapped`, or for a pointer the name
                of an operand or None, as a record has it too. A number may also be the name of one
                that `bind` gets. A pointer that is not among them is the operand of its name;
                arguments that are no parameters are ignored.
        """
        self._config, self._traits, self._device = config, traits, device
        self._num_blocks, self._arguments = num_blocks, arguments
        self._launch = None

    def build(self):
        """Compile (or find) the kernel, load it and pack its scalar arguments, if not yet done."""
        if self._launch is None:
            self._launch = self._built() if self._num_blocks else NoLaunch()
        return self._launch

    def replace(self, make: Callable[[dict[str, object]], Kernel]) -> None:
        """Launch another kernel, which no cache keeps, with the same arguments and extents.

        Args:
            make: makes it, given the arguments.
        """
        if not self._num_blocks:
            return
        kernel, min_blocks = make(self._arguments), self._min_blocks
        if SIMULATED:
            self._launch = SimulatedLaunch(kernel, *self._laid_out, min_blocks or 1)
            return
        cubin = compile_kernel(lambda: kernel, limits_of_device(self._device), min_blocks)
        self._launch = self._on_device(cubin)

    def _built(self):
        config, traits = self._config, self._traits
        limits = limits_of_device(self._device)
        if not SIMULATED:
            return self._on_device(get_cubin(config, traits, limits))
        kernel = _simulated_kernel(config, traits)
        laid_out = *self._laid_out, self._min_blocks or 1
        code = choice("NUMFLASH_SIM_CODE", _SIMULATED_CODE)
        if code == "python":
            return SimulatedLaunch(kernel, *laid_out)
        return ExecutedLaunch(ptx_of(config, traits, limits, code), kernel, *laid_out)

    def _on_device(self, cubin: Cubin) -> "DriverLaunch":
        warn_of_spills(str(self), cubin)
        return DriverLaunch(cubin, self._device, *self._laid_out)

    @property
    def _laid_out(self) -> tuple[int, dict[str, object]]:
        return self._num_blocks, self._arguments

    @property
    def _min_blocks(self) -> int | None:
        return getattr(self._config, "min_blocks_per_sm", None)

    def __str__(self) -> str:
        return f"{self._config.family} {self._config} {self._traits}"

    def bind(self, operands: dict[str, Operand | float | None]) -> Callable[[int], None]:
        """A function of the stream's address that launches on these arrays and keeps them alive.

        `operands` holds the arrays of pointers and tensor maps, and numbers, by their names in the
        arguments.
        """
        return self.build().bind(operands)


class NoLaunch:
    """A launch without blocks, which the driver would refuse."""

    def bind(self, operands):
        """See `Launcher.bind`."""
        return lambda stream: None


class Fill:
    """A launch that sets all of a contiguous array to 0, or one of 32 bits to any number."""

    def __init__(self, operand: Operand, value: float, device: int):
        self._operand, self._value, self._device = operand, value, device

    def __call__(self, stream: int) -> None:
        """Enqueue it."""
        array, value = self._operand.array, self._value
        if SIMULATED:
            library_of(array, "array").operand(array).array[...] = value
            return
        view = library_of(array, "array").view(array)
        size = math.prod(view.shape) * view.itemsize
        driver = open_driver()
        if value == 0:
            fill, word, count = driver.cuMemsetD8Async, 0, size
        else:
            word = int(np.array(value, view.dtype).view(np.uint32))
            fill, count = driver.cuMemsetD32Async, size // 4
        if count:
            pointer = self._operand.pointer
            checked(in_context(self._device, fill, pointer, word, count, stream))


class DriverLaunch:
    """A launch of machine code through the CUDA driver."""

    def __init__(self, cubin: Cubin, device: int, num_blocks: int, arguments: dict):
        self.driver, self.device = open_driver(), device
        self.function = load(cubin, device)
        self.geometry = (num_blocks, 1, 1, cubin.num_threads, 1, 1, cubin.smem_bytes)
        values = {path: value_at(arguments, path) for path, _ in cubin.parameters}
        given = {path for path, letter in cubin.parameters if _is_given(values[path], letter)}
        # The values that a launch fills in come first: maps, which are aligned, pointers, numbers.
        kinds = {"T": 0, "P": 1}
        ordered = sorted(
            cubin.parameters, key=lambda each: kinds.get(each[1], 2 if each[0] in given else 3)
        )
        mapped, self.pointer_names = (
            [values[path] for path, letter in ordered if letter == kind] for kind in kinds
        )
        self.number_names = [values[path] for path, _ in ordered if path in given]
        self.map_names = [each.operand for each in mapped]
        self.encoders = [self._encoder(each.layout) for each in mapped]
        n_maps, n_pointers = len(self.map_names), len(self.pointer_names)
        numbers = "".join(_IN_A_SLOT[letter] for path, letter in ordered if path in given)
        form = "<" + f"{MAP_BYTES}s" * n_maps + f"{n_pointers}Q" + numbers
        self.pack = struct.Struct(form).pack_into
        sizes = [MAP_BYTES if letter == "T" else _SLOT_BYTES for _, letter in ordered]
        self.slots = ctypes.create_string_buffer(sum(sizes) + MAP_ALIGNMENT)
        self.first = aligned(self.slots) - ctypes.addressof(self.slots)
        offset, offsets = self.first, {}
        for (path, letter), size in zip(ordered, sizes, strict=True):
            if letter not in kinds and path not in given:
                struct.pack_into(f"<{letter}", self.slots, offset, values[path])
            offsets[path] = offset
            offset += size
        base = ctypes.addressof(self.slots)
        addresses = [base + offsets[path] for path, _ in cubin.parameters]
        self.addresses = (ctypes.c_void_p * len(addresses))(*addresses)
        self.parameters = ctypes.addressof(self.addresses)
        # Packing and launching must not interleave with another thread's.
        self.lock = threading.Lock()

    def bind(self, operands):
        """See `Launcher.bind`."""
        # Most operands are arrays as they are, which is quick to see.
        bound = [
            operands[name] if type(name) is str else _operand(operands, name)
            for name in self.pointer_names
        ]
        mapped = [operands[name] for name in self.map_names]
        values = [
            encode_at(operand.pointer)
            for encode_at, operand in zip(self.encoders, mapped, strict=True)
        ]
        values += [0 if operand is None else operand.pointer for operand in bound]
        values += [operands[name] for name in self.number_names]

        def launch(stream: int, _keep_alive=(bound, mapped)) -> None:
            in_context(self.device, self._launch, values, stream)

        return launch

    def _encoder(self, layout: TensorLayout) -> Callable[[int], bytes]:
        """The map of a tensor of this layout by its address."""
        encode = encoder(self.driver, layout)
        return lru_cache(_MAX_MAPS)(lambda pointer: in_context(self.device, encode, pointer))

    def _launch(self, values: list[bytes | float], stream: int) -> None:
        with self.lock:
            self.pack(self.slots, self.first, *values)
            status = self.driver.cuLaunchKernel(
                self.function, *self.geometry, stream, self.parameters, 0
            )
        if status[0]:
            raise_error(status[0])


def _is_given(value, letter: str) -> bool:
    """Whether a parameter is a number that `bind` gets by this name."""
    return isinstance(value, str) and letter not in ("T", "P")


def _operand(operands: dict[str, Operand | None], name: str | FromHead | None) -> Operand | None:
    """The operand of a pointer; None if nothing is read through it."""
    if isinstance(name, FromHead):
        array = operands[name.operand].array
        return library_of(array, name.operand).operand(array[..., name.first :])
    return None if name is None else operands[name]


def _simulated_kernel(config: Config, traits: Traits):
    from numflash.kernels.factories import make_kernel

    return make_kernel(config, traits)


class SimulatedLaunch:
    """A launch of a `Kernel` in the simulator."""

    def __init__(self, kernel, num_blocks: int, arguments: dict, blocks_per_sm: int = 1):
        self.kernel, self.num_blocks, self.arguments = kernel, num_blocks, arguments
        self.blocks_per_sm = blocks_per_sm

    def bind(self, operands):
        """See `Launcher.bind`; streams mean nothing here."""
        from numflash import simulator

        kernel = self.kernel

        def pointer(name, array, element):
            array = np.empty(0, element) if array is None else array
            return simulator.GlobalPointer(array, np.dtype(element), name)

        values = iter(_simulated_leaves(kernel, self.arguments, operands, pointer))
        args = [assembled(annotation, values) for annotation in kernel.parameters.values()]
        geometry = self.num_blocks, kernel.num_threads
        run = simulator.launch
        extents = *geometry, args, kernel.smem_bytes, self.blocks_per_sm, kernel.cluster
        return lambda stream: run(kernel.function, *extents)


class ExecutedLaunch:
    """A launch of a kernel's PTX in `numflash.executor`."""

    def __init__(self, ptx: str, kernel, num_blocks: int, arguments: dict, blocks_per_sm: int = 1):
        self.ptx, self.kernel, self.num_blocks = ptx, kernel, num_blocks
        self.arguments, self.blocks_per_sm = arguments, blocks_per_sm

    def bind(self, operands):
        """See `Launcher.bind`; streams mean nothing here."""
        from numflash.executor.launch import Launch
        from numflash.executor.program import program_of
        from numflash.simulator import SEED

        def pointer(name, array, element):
            return array

        kernel = self.kernel
        args = _simulated_leaves(kernel, self.arguments, operands, pointer)
        extents = (self.num_blocks, 1, 1), (kernel.num_threads, 1, 1)
        program = program_of(self.ptx, None, kernel.smem_bytes)
        names = list(kernel.leaves)

        def launch(stream):
            sharing = self.blocks_per_sm
            Launch(program, *extents, args, SEED.value, sharing, names=names).run()

        return launch


def _simulated_leaves(kernel, arguments: dict, operands: dict, pointer: Callable) -> list:
    """The leaves of the arguments; `pointer` makes one of (name, array or None, element)."""
    from numflash.ptx import TensorMap
    from numflash.simulator import SimulatedTensorMap

    def leaf(path, annotation):
        value = value_at(arguments, path)
        if annotation is TensorMap:
            return SimulatedTensorMap(operands[value.operand].array, value.layout)
        if isinstance(annotation, Pointer):
            operand = _operand(operands, value)
            name = getattr(value, "operand", value)
            return pointer(name or path, operand and operand.array, annotation.element)
        return annotation(operands[value] if isinstance(value, str) else value)

    return [leaf(path, annotation) for path, annotation in kernel.leaves.items()]


_loaded: dict[tuple[str, int, bytes], object] = {}
_loading = threading.Lock()


def load(cubin: Cubin, device: int):
    """The kernel of a cubin on a device, loaded, and allowed all the shared memory it needs.

    Raises:
        RuntimeError: the driver refuses.
    """
    # Machine code of equal bytes is the same kernel.
    key = (cubin.entry, device, cubin.code)
    with _loading:
        if key not in _loaded:
            driver = open_driver()
            library = checked(driver.cuLibraryLoadData(cubin.code, [], [], 0, [], [], 0))
            kernel = checked(driver.cuLibraryGetKernel(library, cubin.entry.encode()))
            if cubin.smem_bytes > _DEFAULT_SMEM_LIMIT:
                checked(
                    driver.cuKernelSetAttribute(
                        driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                        cubin.smem_bytes,
                        kernel,
                        checked(driver.cuDeviceGet(device)),
                    )
                )
            in_context(device, _load_now, kernel)
            # The driver takes a kernel wherever it takes a function.
            _loaded[key] = driver.CUfunction(int(kernel))
        return _loaded[key]


def _load_now(kernel) -> None:
    """Load a kernel into the current context.

    By itself the driver does so when the kernel is first launched (CUDA_MODULE_LOADING is LAZY
    by default), which may be inside a graph capture, where memory cannot be allocated.
    """
    driver = open_driver()
    function = checked(driver.cuKernelGetFunction(kernel))
    try:
        result = driver.cuFuncLoad(function)
    except (AttributeError, RuntimeError):
        # It is of CUDA 12.4. Bindings or drivers before do not have it, and load a kernel when
        # its function is asked for (CUDA C++ Programming Guide 12.2, "Lazy Loading").
        return
    checked(result)
