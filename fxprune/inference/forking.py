"""Has the process been forked since? PyTorch's threads do not survive that, and waiting for them lasts for ever."""

import os

import torch

from fxprune.errors import AccelerationError

_forks = 0


def _forked() -> None:
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def forks() -> int:
    """How many forks lie between this process and the one in which fxprune was imported."""
    return _forks


def check_fork(made: int) -> None:
    """See that PyTorch can use its threads for what was made after so many forks.

    Raises:
        AccelerationError: it would wait for those of the parent.
    """
    if made < _forks and torch.get_num_threads() > 1:
        raise AccelerationError(
            "the process was forked after the model was accelerated, and the threads of PyTorch do not survive that; "
            "call torch.set_num_threads(1) in the child, or start processes with 'spawn'"
        )
