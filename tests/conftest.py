"""What every test runs under: one thread, a random state of its own, and a cache of its own."""

import os
import tempfile
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

# Most nets here are so small that waiting for a second thread costs up to four times what it saves, and workers of
# pytest-xdist that each start a thread per core slow one another down. To use more cores, use more workers.
torch.set_num_threads(1)
os.environ.pop("COLUMNS", None)  # pytest-xdist sets it, and tables would be wrapped in its workers alone

# `make test-all` asks for the second. Tests with numbers of their own take their share of it: `products_harness`.
settings.register_profile("quick", max_examples=20, deadline=None)
settings.register_profile("thorough", max_examples=100, deadline=None)
settings.load_profile("quick")


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop() -> Iterator[None]:
    """Neither read nor write the user's cache of kernels and times. Workers of pytest-xdist inherit the folder, so that
    the kernel is built once a session.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        return (yield)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("FXPRUNE_CACHE", folder)
        patch.delenv("FXPRUNE_NATIVE", raising=False)
        return (yield)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """No test depends on those before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Other libraries find an empty home and no network: some write settings or ask for news as they are imported."""
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "YOLO_CONFIG_DIR", "HF_HOME", "MPLCONFIGDIR"):
            patch.setenv(variable, str(tmp_path_factory.mktemp(variable.lower())))
        for variable in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "NO_ALBUMENTATIONS_UPDATE"):
            patch.setenv(variable, "1")
        for variable, value in (("YOLO_OFFLINE", "true"), ("YOLO_AUTOINSTALL", "false"), ("YOLO_VERBOSE", "false")):
            patch.setenv(variable, value)
        yield


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What forks comes first: torch refuses to differentiate in a fork of a process in which its autograd has threads,
    as it has after the first `torch.compile`.
    """
    items.sort(key=lambda item: item.get_closest_marker("forks") is None)
