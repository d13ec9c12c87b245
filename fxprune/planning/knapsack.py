"""One choice for each layer, least total damage, every total cost bounded: a multiple-choice knapsack with one or more
constraints (Kellerer, Pferschy, Pisinger, "Knapsack Problems", Springer 2004, chapters 9 and 11), as an integer
program.
"""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import csr_array

T = TypeVar("T")

DAMAGE_SCALE = 1e4
"""HiGHS ends at an absolute gap of 1e-6, which must be nothing beside the smallest damage that matters."""
GAP, SECONDS = 1e-3, 60.0
"""With several constraints, the program ends within this share of the optimum, or after so long with the best found: to
prove an optimum can take hours."""


@dataclass(frozen=True)
class Way(Generic[T]):
    """One choice for a layer.

    Attributes:
        layer: which.
        what: what is chosen.
        damage: what it does.
        costs: of each kind.
    """

    layer: str
    what: T
    damage: float
    costs: tuple[float, ...]


def least_damage(ways: Sequence[Way[T]], limits: Sequence[float]) -> dict[str, T] | str:
    """The choice for each layer with the least total damage whose costs stay within the limits, or why there is none.

    Args:
        ways: at least one of each layer.
        limits: of the total of each kind of cost.
    """
    rows = np.unique([way.layer for way in ways], return_inverse=True)[1]
    one_each = csr_array((np.ones(len(rows)), (rows, np.arange(len(rows)))))
    costs = np.array([way.costs for way in ways]).T
    damages = np.array([way.damage for way in ways])
    options = {"mip_rel_gap": 0.0} if len(limits) == 1 else {"mip_rel_gap": GAP, "time_limit": SECONDS}
    with silent():
        result = milp(
            damages * DAMAGE_SCALE / (damages.max() or 1.0),
            integrality=np.ones(len(rows)),
            bounds=(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(costs, -np.inf, np.array(limits))],
            options=options,
        )
    if result.x is None:
        return str(result.message)
    return {way.layer: way.what for way, is_taken in zip(ways, result.x > 0.5, strict=True) if is_taken}


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Keep what C code prints off the standard output, where the command line may be writing JSON: HiGHS 1.12, of scipy
    1.17, prints a line of its own now and then, whatever its options say.
    """
    try:
        sys.stdout.flush()
        kept = os.dup(1)
    except (OSError, ValueError, AttributeError):  # there is no standard output
        yield
        return
    with open(os.devnull, "wb") as sink:
        os.dup2(sink.fileno(), 1)
        try:
            yield
        finally:
            with contextlib.suppress(OSError, TypeError, AttributeError):  # not on every system
                ctypes.CDLL(None).fflush(None)
            os.dup2(kept, 1)
            os.close(kept)
