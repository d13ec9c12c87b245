"""How good is a pruned network? Its agreement with the dense one, and the accuracy of both where there are labels."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.calibration.agreement import Agreement, interval, measure_agreement
from fxprune.errors import FxpruneError
from fxprune.graph.containers import tensors_in

BATCH = 32
"""Pictures at a time."""
HELD_BACK = "pictures that nothing was calibrated with"
"""Of `Evaluation.which`: the part of a folder that was held back."""


@dataclass(frozen=True)
class Evaluation:
    """What was found. `str()` is a sentence.

    Attributes:
        inputs: how many pictures.
        agreement: of the network with the dense one; None if there is no dense one, or they cannot be compared.
        accuracy, dense_accuracy: share of the pictures that are put into their class; None without labels, or without a
            dense network.
        source: where the labels come from.
        which: pictures these are, in words behind their number.
    """

    inputs: int
    agreement: Agreement | None
    accuracy: float | None
    dense_accuracy: float | None
    source: str = ""
    which: str = "pictures"

    @property
    def lost(self) -> float | None:
        """Accuracy lost, of 1; without labels what is not agreed on, which is the most that can be lost."""
        if self.accuracy is not None and self.dense_accuracy is not None:
            return self.dense_accuracy - self.accuracy
        return None if self.agreement is None else 1 - self.agreement.share

    def to_dict(self) -> dict[str, Any]:
        """Return it as dicts, numbers and strings."""
        return asdict(self)

    def __str__(self) -> str:
        parts = []
        if self.accuracy is not None:
            dense = "" if self.dense_accuracy is None else f", dense {self._share(self.dense_accuracy)}"
            parts.append(f"accuracy {self._share(self.accuracy)}{dense}, labels: {self.source}")
        if self.agreement is not None:
            what = "same class as the dense network" if self.agreement.classes else "of the dense network's variance"
            parts.append(f"{what} {self.agreement.figure}")
        if self.accuracy is not None or (self.agreement is not None and self.agreement.classes):
            parts.append("in brackets 95 % intervals")
        return f"on {self.inputs} {self.which}: {'; '.join(parts) or 'the outputs cannot be compared'}"

    def _share(self, share: float) -> str:
        return f"{100 * share:.1f} % ({interval(share, self.inputs)})"


def evaluate(
    network: nn.Module,
    inputs: Tensor,
    labels: Tensor | None = None,
    dense: nn.Module | None = None,
    held_out: bool = True,
    source: str = "",
    which: str = "pictures",
) -> Evaluation:
    """Look at a network, in evaluation mode.

    Args:
        network: dense or pruned; its mode is left as it is found.
        inputs: `(N, ...)`, as it reads them.
        labels: int64 `(N,)`.
        dense: what it was made from.
        held_out: whether it was fitted without these.
        source: where the labels come from, in words.
        which: see `Evaluation`.

    Raises:
        FxpruneError: there are labels, and the network gives no scores of so many classes.
    """
    networks = [network] if dense is None else [network, dense]
    modes = [each.training for each in networks]
    try:
        for each in networks:
            each.eval()
        batches = torch.split(inputs, BATCH)
        agreement = None
        if dense is not None:
            agreement = measure_agreement(dense, network, batches, lambda called, batch: called(batch), held_out)
        right = None if labels is None else [accuracy(each, inputs, labels) for each in networks]
    finally:
        for each, mode in zip(networks, modes, strict=True):
            each.train(mode)
    own = None if right is None else right[0]
    other = None if right is None or dense is None else right[1]
    return Evaluation(len(inputs), agreement, own, other, source, which)


def accuracy(network: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """The share of `inputs` whose largest score is that of their label.

    Raises:
        FxpruneError: the network gives no scores of so many classes.
    """
    right = 0
    with torch.no_grad():
        for batch, wanted in zip(torch.split(inputs, BATCH), torch.split(labels, BATCH), strict=True):
            scores = next((t for t in tensors_in(network(batch)) if t.is_floating_point()), None)
            if scores is None or scores.dim() != 2 or scores.shape[1] <= int(wanted.max()):
                found = "no tensor" if scores is None else f"a tensor {tuple(scores.shape)}"
                raise FxpruneError(
                    f"accuracy needs scores of classes (N, K), and the network gives {found}; leave labels out"
                )
            right += int((scores.argmax(1) == wanted).sum())
    return right / len(labels)
