"""numflash.torch with the driver stubbed: CPU tensors stand for those on a GPU."""

import sys

import pytest

from numflash.runtime.mode import SIMULATED

if SIMULATED:
    pytest.skip("needs NUMBA_ENABLE_CUDASIM unset", allow_module_level=True)
torch = pytest.importorskip("torch", reason='needs PyTorch: pip install "numflash[torch]"')

import numflash  # noqa: E402
import numflash.torch as nt  # noqa: E402
from numflash.calls import ready  # noqa: E402
from tests.support import torch_devices  # noqa: E402

FAMILIES = ["forward", "delta", "backward-dkdv", "backward-dq"]


@pytest.fixture
def gpu(monkeypatch):
    """A fake Ampere."""
    return torch_devices.install(monkeypatch, (8, 0), 108, 40 * 2**20)


def operands(count=3):
    return [torch.randn(2, 64, 4, 64).half().requires_grad_() for _ in range(count)]


def test_both_directions_are_launched_on_the_current_stream(gpu):
    q, k, v = operands()
    out = nt.attention(q, k, v, causal=True)
    gpu.library.current = 0x99
    out.sum().backward()
    assert [run.family for run in gpu.driver.launches] == FAMILIES
    assert [run.stream for run in gpu.driver.launches] == [0x57, 0x99, 0x99, 0x99]


def test_tensors_lie_where_kernels_are_told(gpu):
    """No copies: operands, results and gradients are the tensors of autograd."""
    q, k, v = operands()
    out = nt.attention(q, k, v)
    (forward,) = gpu.driver.launches
    given = {name: forward.arguments[name] for name in ("q", "k", "v", "out")}
    tensors = {"q": q, "k": k, "v": v, "out": out}
    assert given == {name: x.data_ptr() for name, x in tensors.items()}


def test_a_second_call_checks_and_chooses_nothing(gpu):
    nt.attention(*operands()).sum().backward()
    made = dict(ready._ready)
    nt.attention(*operands()).sum().backward()
    assert ready._ready == made and len(made) == 2


def test_options_are_found_again(gpu):
    """Recorded or not, with tensors among the options or not."""
    slopes = torch.rand(4)
    for _ in range(2):
        nt.attention(*operands(), alibi_slopes=slopes, window_size=(5, 0)).sum().backward()
        with torch.no_grad():
            nt.attention(*operands(), alibi_slopes=slopes, window_size=(5, 0))
    assert len(ready._ready) == 2


def functions_called(call) -> int:
    """How many functions of Python's a call runs, once it is ready."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    call()
    before = sys.getprofile()
    sys.setprofile(count)
    try:
        call()
    finally:
        sys.setprofile(before)
    return calls


def test_recording_costs_no_more_than_the_call_itself(gpu):
    """What PyTorch's Function costs is saved: options that say the same have one key.

    `python -m tests.support.torch_devices` measures it; here functions are counted.
    """
    learned = operands()
    plain = [x.detach() for x in learned]
    of_library = functions_called(lambda: numflash.attention(*plain, causal=True))
    recorded = functions_called(lambda: nt.attention(*learned, causal=True))
    assert functions_called(lambda: nt.attention(*plain, causal=True)) < recorded <= of_library


def test_options_that_are_equal_and_not_the_same(gpu):
    """1 is no True, with options that many calls share, too."""
    q, k, v = operands()
    for causal in (True, False, True):
        nt.attention(q, k, v, causal=causal, window_size=(8, 8))
        nt.attention(q, k, v, causal=causal)
    for wrong in (1, 0, 1.0):
        with pytest.raises(TypeError, match="causal must be True or False"):
            nt.attention(q, k, v, causal=wrong)
