"""Packages that a comparison can do without, until it is asked for what they are for."""

import importlib.util

from fxprune.errors import FxpruneError

EXTRAS = {"torch_pruning": "torch-pruning", "matplotlib": "plots"}
"""What `pip install 'fxprune[...]'` calls them."""


class ComparisonError(FxpruneError):
    """What was asked for cannot be compared, or not here."""


def is_installed(package: str) -> bool:
    """Whether a package can be imported."""
    return importlib.util.find_spec(package) is not None


def require(package: str) -> None:
    """See that one of `EXTRAS` is installed, before anything else is done.

    Raises:
        ComparisonError: it is not; the message says how to get it.
    """
    if not is_installed(package):
        raise ComparisonError(f"{package} is not installed; pip install 'fxprune[{EXTRAS[package]}]'")
