"""What every test runs under: one thread, and a random state of its own."""

import pytest
import torch

# Most nets here are so small that waiting for a second thread costs up to four times what it saves, and workers of
# pytest-xdist that each start a thread per core slow one another down. To use more cores, use more workers.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """No test depends on those before it."""
    torch.manual_seed(0)
