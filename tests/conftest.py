"""What every test runs under: a share of the cores for each worker, and one random state."""

import os

import pytest
import torch

# Workers of pytest-xdist that each start a thread per core slow one another down many times over.
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, (os.cpu_count() or 1) // _workers))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """No test depends on those before it."""
    torch.manual_seed(0)
