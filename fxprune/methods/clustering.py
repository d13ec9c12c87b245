"""What every method returns: filter groups with their input channels."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]
Labels = npt.NDArray[np.intp]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Clustering:
    """Filter groups with their input channels.

    Args:
        out_order: `(O,)` filters in group order, ascending inside a group; groups are ordered by their first filter.
        kept: `(n, k)` input channels that each group keeps, ascending.
        history: the kept importance after each half-step of the search that won; empty if the method has none.
        block_cost: the share of it that is lost because channels are kept in blocks; None if they are not.
    """

    out_order: tuple[int, ...]
    kept: tuple[tuple[int, ...], ...]
    history: tuple[float, ...] = ()
    block_cost: float | None = None

    @classmethod
    def from_labels(
        cls, labels: Labels, chosen: Mask, history: tuple[float, ...] = (), block_cost: float | None = None
    ) -> "Clustering":
        """Put a grouping into its normal order.

        Args:
            labels: `(O,)` the group of each filter, `0..n-1`, every group equally often.
            chosen: `(n, C)` the channels that each group keeps, equally many in every row.
            history: see the class.
            block_cost: see the class.
        """
        first = [int(np.flatnonzero(labels == group)[0]) for group in range(len(chosen))]
        order = np.argsort(first)
        return cls(
            out_order=tuple(int(f) for group in order for f in np.flatnonzero(labels == group)),
            kept=tuple(tuple(int(c) for c in np.flatnonzero(chosen[group])) for group in order),
            history=history,
            block_cost=block_cost,
        )
