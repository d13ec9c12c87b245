"""First-order Taylor importance: how much the loss moves when a kernel goes."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fxprune.criteria.criterion import Criterion, Evidence, ScoreFunction
from fxprune.errors import PlanError
from fxprune.graph.convolutions import Convolution, convolutions, oriented


@dataclass(frozen=True, eq=False)  # batches of tensors cannot be compared by ==
class Taylor(Criterion):
    """Sum over the kernel of `(w * gradient) ** 2`, for the gradient of the mean loss over the batches.

    `(w * gradient) ** 2` is the squared first-order change of the loss when `w` becomes 0: Molchanov, Mallya, Tyree,
    Frosio, Kautz, "Importance Estimation for Neural Network Pruning", CVPR 2019, section 3, the first-order form with
    the sum over a set of weights. The gradient is that of a copy of the model in evaluation mode, in the type of the
    model: in half precision small ones vanish. A layer on which the loss does not depend scores 0 throughout.

    Args:
        loss: `(output, target)` to a tensor with one number, such as `torch.nn.functional.cross_entropy`.
        data: batches `(input, target)`; tensors in them move to the device of the model. Every batch counts the same.
            A generator is used up by one plan.
        name: as errors and plans are to call it.

    Raises:
        PlanError: on binding, if the model is missing, there is no batch, a batch is no pair, or the loss of a batch is
            no single finite number that depends on a convolution.
    """

    loss: Callable[[Any, Any], Tensor]
    data: Iterable[tuple[Any, Any]]
    name: str = "taylor"

    def bind(self, evidence: Evidence) -> ScoreFunction:
        if evidence.model is None:
            raise PlanError(
                f"criterion {self.name!r} needs the model to run its data through; pass Evidence(model=...)"
            )
        if not isinstance(self.data, Iterable):
            raise PlanError(
                f"criterion {self.name!r}: data is a {type(self.data).__name__}; it must be a loader or a list of "
                "batches (input, target)"
            )
        # Drawing from a loader advances the global generator, even where nothing is shuffled.
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            scores = self._scores(copy.deepcopy(evidence.model))

        def score(name: str, conv: Convolution) -> Tensor:
            if name not in scores:
                raise PlanError(
                    f"{name}: criterion {self.name!r} knows no such convolution in the model it was bound to"
                )
            return scores[name]

        return score

    def _scores(self, model: nn.Module) -> dict[str, Tensor]:
        """The scores of all convolutions of a model, whose mode and flags are changed."""
        model.eval().requires_grad_(False)
        convs = convolutions(model)
        weights = {
            name: module.weight.requires_grad_()
            for name, module in convs.items()
            if "weight" in module._parameters and module.weight.is_floating_point()
        }
        if not weights:
            raise PlanError(f"criterion {self.name!r}: {type(model).__name__} has no convolution to score")
        total = {name: torch.zeros(weight.shape, dtype=torch.float64) for name, weight in weights.items()}
        device = next(iter(weights.values())).device
        count = 0
        for count, batch in enumerate(self.data, start=1):
            input, target = tree_map(
                lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, self._pair(batch)
            )
            loss = self._checked(self.loss(model(input), target), count - 1)
            gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for name, gradient in zip(weights, gradients, strict=True):
                if gradient is not None:
                    total[name] += gradient.to("cpu", torch.float64)
        if not count:
            raise PlanError(
                f"criterion {self.name!r}: data holds no batch; it must hold at least one (input, target). A generator "
                "is used up by its first plan: pass a list or a loader"
            )
        effect = {
            name: oriented(weight.detach().to("cpu", torch.float64) * total[name] / count, convs[name]).square()
            for name, weight in weights.items()
        }
        return {name: squares.sum(dim=tuple(range(2, squares.dim()))) for name, squares in effect.items()}

    def _pair(self, batch: object) -> tuple[Any, Any]:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            what = (
                f"{type(batch).__name__} of {len(batch)}" if isinstance(batch, (tuple, list)) else type(batch).__name__
            )
            raise PlanError(f"criterion {self.name!r}: a batch of data is a {what}; it must be a pair (input, target)")
        return batch[0], batch[1]

    def _checked(self, loss: object, batch: int) -> Tensor:
        who = f"criterion {self.name!r}: the loss of batch {batch}"
        if not isinstance(loss, Tensor):
            raise PlanError(f"{who} is a {type(loss).__name__}; it must be a tensor with one number")
        if loss.numel() != 1:
            raise PlanError(f"{who} has shape {tuple(loss.shape)}; it must be one number, such as its mean")
        if not bool(torch.isfinite(loss)):
            raise PlanError(f"{who} is {loss.item()}; it must be finite: look at the data, the loss and the weights")
        if not loss.requires_grad:
            raise PlanError(
                f"{who} has no gradient: it does not depend on a convolution, or the forward or the loss detaches it"
            )
        return loss.reshape(())
