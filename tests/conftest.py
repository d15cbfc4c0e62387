import pytest
import torch

import weightalign_cuda as wa

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SERVING = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
BACKENDS = [name for name in SERVING[DEVICE] if wa.backends()[name] == "available"]


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture(params=BACKENDS)
def backend(request):
    """Each backend that serves `device` here, in force during the test."""
    with wa.use_backend(request.param):
        yield request.param


@pytest.fixture(params=[name for name in BACKENDS if name != "reference"])
def native(request):
    """As `backend`, for what only the registered ops promise: the reference is PyTorch's own autograd."""
    with wa.use_backend(request.param):
        yield request.param


@pytest.fixture
def restore_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
