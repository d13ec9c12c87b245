"""What a criterion is: given its evidence, it scores the kernels of a convolution. How two combine; how one is used."""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.errors import PlanError
from fxprune.graph.convolutions import Convolution, filters_first, kernels_of
from fxprune.methods.clustering import Matrix
from fxprune.plans.eligibility import check_weight, count_not_finite

ScoreFunction = Callable[[str, Any], Tensor]  # the convolution, as whichever class the function is written for
"""`(name, conv)` to the importance `(O, C)` of each kernel: finite, 0 or more, high means keep.

The importance of a kernel group is the sum over its filters, so a score should be a quantity that adds up: an energy
rather than a norm.
"""


@dataclass(frozen=True)
class Evidence:
    """What a criterion may need besides the weights. Each part is optional; a criterion says what it lacks.

    Args:
        model: the model whose convolutions are scored. It is only read.
        earlier: state dict of an earlier training state: `"<name of the conv>.weight"` to `(O, C, kh, kw)`.
        moments: name of the conv to the second moment `E[x_c^2]` of each input channel `(C,)`, over images and
            positions.
        seed: of random scores.
    """

    model: nn.Module | None = None
    earlier: Mapping[str, Tensor] | None = None
    moments: Mapping[str, Tensor] | None = None
    seed: int = 0


class Criterion(ABC):
    """How much a kernel matters. `a + b`, `a * b` and `2 * a` are criteria again; `a` or `b` may be a plain function.

    Scores of different criteria have different units. A product ranks the same whatever the units; in a sum the one
    with the larger numbers dominates, and differently so in each layer: weigh the terms. A product wants scores with a
    natural zero, which `magnitude_increase` does not have.
    """

    name: str

    @abstractmethod
    def bind(self, evidence: Evidence) -> ScoreFunction:
        """The score function, given what is known.

        Raises:
            PlanError: the criterion needs evidence that is missing; the message says how to provide it. The score
                function raises it too, where the evidence of one layer is missing or does not fit.
        """

    def __add__(self, other: object) -> "Criterion":
        return _combined(self, other, torch.add)

    def __radd__(self, other: object) -> "Criterion":
        return _combined(other, self, torch.add)

    def __mul__(self, other: object) -> "Criterion":
        return _combined(self, other, torch.mul)

    def __rmul__(self, other: object) -> "Criterion":
        return _combined(other, self, torch.mul)


@dataclass(frozen=True)
class Custom(Criterion):
    """A function of one's own as a criterion: `function(name, conv)` gives `(O, C)` and leaves the conv as it is."""

    name: str
    function: ScoreFunction

    def bind(self, evidence: Evidence) -> ScoreFunction:
        # Checked here, not only at the end: in a sum or product a wrong shape might broadcast to the right one.
        return lambda name, conv: check_scores(name, conv, self.function(name, conv), self.name)


@dataclass(frozen=True)
class Combined(Criterion):
    """Elementwise sum or product of two criteria."""

    name: str
    left: Criterion
    right: Criterion
    operation: Callable[[Tensor, Tensor], Tensor]

    def bind(self, evidence: Evidence) -> ScoreFunction:
        left, right = self.left.bind(evidence), self.right.bind(evidence)
        return lambda name, conv: self.operation(left(name, conv), right(name, conv))


@dataclass(frozen=True)
class Factor(Criterion):
    """The 2 of `2 * l2`: one number for every kernel."""

    name: str
    value: float

    def bind(self, evidence: Evidence) -> ScoreFunction:
        return lambda name, conv: torch.full(conv.weight.shape[:2], self.value, dtype=torch.float64)


def as_criterion(value: object) -> Criterion | None:
    """A criterion as it is, a function `(name, conv) -> (O, C)` wrapped, and None for anything else.

    Raises:
        PlanError: it is a function of other arguments.
    """
    if isinstance(value, Criterion):
        return value
    if not callable(value) or isinstance(value, type):
        return None
    name = getattr(value, "__name__", type(value).__name__)
    try:
        inspect.signature(value).bind("name", nn.Conv2d)
    except TypeError as error:
        raise PlanError(
            f"criterion {name!r} cannot be called as {name}(name, conv) ({error}); it must take the name of a layer "
            "and its convolution, and return scores (O, C)"
        ) from error
    except ValueError:  # written in C, with a signature that Python does not know
        pass
    return Custom(name, value)


def check_scores(name: str, conv: Convolution, answer: object, criterion: str) -> Tensor:
    """See that what a criterion answered are scores, and return them `(O, C)` in float64 on the CPU.

    Args:
        name: the layer, for the message.
        conv: the convolution that was scored.
        answer: what came back.
        criterion: its name, for the message.

    Raises:
        PlanError: it is no real `(O, C)` tensor with values, or one of these is negative, infinite or NaN.
    """
    who = f"{name}: criterion {criterion!r}"
    expected = tuple(kernels_of(conv).shape[:2])
    if not isinstance(answer, Tensor):
        raise PlanError(f"{who} returned a {type(answer).__name__}; it must return a Tensor {expected}")
    if tuple(answer.shape) != expected:
        raise PlanError(
            f"{who} returned shape {tuple(answer.shape)}; it must return one score for each filter and input channel, "
            f"{expected}"
        )
    if answer.is_complex() or answer.is_meta:
        raise PlanError(
            f"{who} returned a {answer.dtype} tensor on {answer.device}; scores must be real and have values"
        )
    scores = answer.detach().to("cpu", torch.float64)
    if wrong := count_not_finite(scores):
        raise PlanError(f"{who} returned {wrong} scores of {scores.numel()} that are NaN or infinite")
    lowest = float(scores.min())
    if lowest < 0:
        raise PlanError(
            f"{who} returned negative scores, the lowest {lowest:.4g}; scores must be 0 or more, high for kernels to "
            "keep: subtract the minimum, or take absolute values or squares"
        )
    return scores


def kernel_scores(name: str, conv: Convolution, score: ScoreFunction, criterion: str) -> Matrix:
    """Importance of each kernel of a convolution: `(O, C)` float64, whatever the type and device of the weight.

    Args:
        name: of the layer.
        conv: the layer; only read. A score function that writes to its weight is undone and refused.
        score: what scores it.
        criterion: the name of `score`, for messages.

    Raises:
        PlanError: the weight has no finite values, evidence for this layer is missing, the answer is no scores (see
            `check_scores`), or the weight was changed. The message begins with `name`.
    """
    check_weight(name, conv.weight)
    weight = conv.weight
    before = weight.detach().clone()  # not the version counter: writing through `.data` does not raise it
    with torch.no_grad():
        answer = score(name, filters_first(conv))
        if conv.weight is not weight or not torch.equal(weight, before):
            conv.weight = weight
            weight.copy_(before)
            raise PlanError(
                f"{name}: criterion {criterion!r} changed the weight of the layer (it is restored); work on "
                "conv.weight.clone()"
            )
    scores: Matrix = check_scores(name, conv, answer, criterion).numpy()
    return scores


def _combined(left: object, right: object, operation: Callable[[Tensor, Tensor], Tensor]) -> Criterion:
    parts = [_operand(value, operation) for value in (left, right)]
    names = [f"({part.name})" if _binds_weaker(part, operation) else part.name for part in parts]
    return Combined((" + " if operation is torch.add else " * ").join(names), parts[0], parts[1], operation)


def _operand(value: object, operation: Callable[[Tensor, Tensor], Tensor]) -> Criterion:
    if operation is torch.mul and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not 0 < value < math.inf:
            raise PlanError(f"the factor of a criterion is {value}; it must be positive and finite")
        return Factor(f"{value:g}", float(value))
    criterion = as_criterion(value)
    if criterion is None:
        raise PlanError(
            f"a criterion cannot be combined with {value!r}; add or multiply criteria (fxprune.criteria.CRITERIA has "
            "those with names) and functions (name, conv) -> scores (O, C), or multiply by a number"
        )
    return criterion


def _binds_weaker(part: Criterion, operation: Callable[[Tensor, Tensor], Tensor]) -> bool:
    return operation is torch.mul and isinstance(part, Combined) and part.operation is torch.add
