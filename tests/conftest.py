"""What every test runs under: one thread, a GPU only where a test asks for one, and a reason for every skip."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Before torch is imported, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)

_NO_GPU = "needs a CUDA device, and this machine has none: NOT TESTED here"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason=_NO_GPU))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device in turn; a test that takes it runs on all of them."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _same_random_numbers_everywhere() -> Iterator[None]:
    """Every test starts from seed 0 and leaves the process's settings as they were."""
    torch.manual_seed(0)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
