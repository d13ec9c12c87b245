"""Check that two models compute the same function: in float64, on copies, in evaluation and in training mode.

In float64 reordering a sum changes a result by about 1e-16 of its terms, so a difference above 1e-10 of the largest
output is a defect, not rounding. A model that
amplifies such changes itself is measured: the limit grows with its response to noise of 1e-15 on the input.
Training mode here means batch statistics in the normalisation layers; dropout and its kin stay off, for they draw by
position.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from fxprune.errors import FxpruneError, VerificationError
from fxprune.exact.record import RECORD
from fxprune.graph.copying import share_tensors
from fxprune.graph.tracing import Inputs, as_inputs, trace
from fxprune.plans.masking import remaining

# Share of the largest output (design, section 5), and how far beyond its own response to rounding a model may go.
TOLERANCE = 1e-10
NOISE = 1e-15
NOISE_MARGIN = 1e3
LARGEST_LIMIT = 1e-3  # a model that chaotic cannot be told from another one

# A folded BatchNorm rounds each weight to its own type once; the sum of a few layers stays within this many of its
# steps.
ROUNDING_MARGIN = 100


@dataclass(frozen=True)
class Verification:
    """Result of a check that succeeded.

    Attributes:
        max_abs: largest absolute difference between two outputs, over all modes.
        max_rel: the same, as a share of the largest absolute output.
        modes: `"eval"`, `"train"`: the modes compared.
    """

    max_abs: float
    max_rel: float
    modes: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"equal in {' and '.join(self.modes)} mode: "
            f"largest difference {self.max_abs:.1e} ({self.max_rel:.1e} of the largest output)"
        )


def verify(
    pruned: nn.Module, masked: nn.Module, example_inputs: Inputs, *, modes: Sequence[str] | None = None
) -> Verification:
    """Check that `pruned` computes what `masked` computes.

    Both run in float64 on copies that share no state with them; a batch of one sample becomes two, so that batch
    statistics exist.

    Args:
        pruned: the rewritten model.
        masked: the oracle.
        example_inputs: positional arguments of both, tensors on their device. A floating-point input without variation
            is replaced by noise, for it could hide errors.
        modes: which modes to compare; by default those that the compilation of `pruned` keeps, else both. A model whose
            forward differs between modes in structure is compiled for evaluation only.

    Raises:
        VerificationError: they differ; the message names the first node of `pruned` where.
    """
    record = getattr(pruned, "meta", {}).get(RECORD)
    if modes is None:
        modes = getattr(record, "modes", ("eval", "train"))
    inputs = _informative(as_inputs(example_inputs))
    largest_abs = largest_rel = 0.0
    for mode in modes:
        expected, statistics = evaluate(masked, inputs, mode)
        found, found_statistics = evaluate(pruned, inputs, mode)
        limit = max(TOLERANCE, ROUNDING_MARGIN * getattr(record, "rounding", 0.0))
        if expected and not any(bool(tensor.isfinite().any()) for tensor in expected):
            raise VerificationError(
                f"the output of the masked model has no finite value in {mode} mode, so nothing can be compared; "
                "pass other example inputs, or repair the weights"
            )
        worst_abs, worst_rel = difference(found, expected)
        if worst_rel > limit:
            response = _response_to_noise(masked, inputs, mode, expected)
            limit = max(limit, min(NOISE_MARGIN * response, LARGEST_LIMIT))
        if not worst_rel <= limit:
            where = _first_difference(pruned, masked, inputs, mode, as_inputs(example_inputs))
            raise VerificationError(
                f"the models differ in {mode} mode by {worst_rel:.1e} of the largest output "
                f"(limit {limit:.0e}); {where}. "
                "This is a defect of fxprune, or the models do not belong together; please report it with the model"
            )
        _compare_statistics(found_statistics, _without_removed(statistics, record), limit)
        largest_abs, largest_rel = max(largest_abs, worst_abs), max(largest_rel, worst_rel)
    return Verification(largest_abs, largest_rel, tuple(modes))


def evaluate(model: nn.Module, inputs: tuple[Any, ...], mode: str) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Run a float64 copy of `model` in `mode`; return the output tensors, and the running statistics after it by buffer
    name.
    """
    for lazily in (True, False):
        copy = _prepare(model, mode, lazily)
        try:
            with torch.no_grad():
                output = copy(*_as_double(inputs))
            break
        except RuntimeError:  # a layer's weight that another module uses directly is not converted in time
            if not lazily:
                raise
    statistics = {
        name: buffer for name, buffer in copy.named_buffers() if name.endswith(("running_mean", "running_var"))
    }
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)], statistics


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> tuple[float, float]:
    """Largest absolute difference between two lists of tensors, and its share of the largest expected value of its
    tensor.

    Raises:
        VerificationError: the lists, or shapes in them, do not match.
    """
    if [t.shape for t in found] != [t.shape for t in expected]:
        shapes = [[tuple(t.shape) for t in side] for side in (found, expected)]
        raise VerificationError(
            f"the outputs have shapes {shapes[0]}, expected {shapes[1]}; the models do not belong together"
        )
    worst_abs = worst_rel = 0.0
    for a, b in zip(found, expected, strict=True):
        if b.numel() == 0:
            continue
        a, b = a.double(), b.double()
        if not all(torch.equal(kind(a), kind(b)) for kind in (torch.isnan, torch.isposinf, torch.isneginf)):
            return math.inf, math.inf
        finite = b.isfinite()
        gap = float((a - b)[finite].abs().max()) if bool(finite.any()) else 0.0
        scale = float(b[finite].abs().max()) if bool(finite.any()) else 0.0
        worst_abs = max(worst_abs, gap)
        worst_rel = max(worst_rel, gap / scale if scale > 0 else (math.inf if gap > 0 else 0.0))
    return worst_abs, worst_rel


# --- float64 copies ---------------------------------------------------------------------------------------------------


def _prepare(model: nn.Module, mode: str, lazily: bool) -> nn.Module:
    """Copy `model` in float64, in the given mode. Lazily: large layers convert their weights only while they run, so
    the copy needs little memory.
    """
    late = (
        {id(t) for m in model.modules() if type(m) in _LATE for t in m.parameters(recurse=False)} if lazily else set()
    )

    def convert(tensor: Tensor) -> Tensor:
        if id(tensor) in late or not tensor.is_floating_point():
            return tensor if isinstance(tensor, nn.Parameter) else tensor.clone()
        double = tensor.detach().double().clone()
        return nn.Parameter(double, requires_grad=False) if isinstance(tensor, nn.Parameter) else double

    copy = share_tensors(model, convert).eval()
    for module in copy.modules():
        if mode == "train" and isinstance(module, nn.modules.batchnorm._NormBase):
            module.train()
        if type(module) in _LATE and lazily:
            module.register_forward_pre_hook(_load_double)
            module.register_forward_hook(_unload_double)
    return copy


_LATE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def _load_double(module: nn.Module, args: Any) -> None:
    module.__dict__["_single"] = dict(module._parameters)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.detach().double(), requires_grad=False)


def _unload_double(module: nn.Module, args: Any, output: Any) -> None:
    module._parameters.update(module.__dict__.pop("_single"))


def _as_double(inputs: Any) -> Any:
    return tree_map(
        lambda leaf: leaf.detach().double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf, inputs
    )


def _informative(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Make inputs fit for a check: noise in place of constants, two samples in place of one."""
    generator = torch.Generator().manual_seed(0)

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.device)

    def improve(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.numel() < 2:
            return leaf
        leaf = leaf.detach().double()
        return noise(leaf) if bool((leaf == leaf.reshape(-1)[0]).all()) else leaf

    improved = tree_map(improve, inputs)
    tensors = [leaf for leaf in tree_leaves(improved) if isinstance(leaf, Tensor)]
    if not all(tensor.dim() > 1 and tensor.shape[0] == 1 for tensor in tensors):
        return tuple(improved)
    return tuple(
        tree_map(lambda leaf: torch.cat([leaf, leaf.flip(-1)]) if isinstance(leaf, Tensor) else leaf, improved)
    )


def _response_to_noise(model: nn.Module, inputs: tuple[Any, ...], mode: str, expected: Sequence[Tensor]) -> float:
    """Relative change of the output when the input changes by 1e-15 of itself: how far rounding alone can move this
    model.
    """
    generator = torch.Generator().manual_seed(1)

    def shake(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            return leaf
        return leaf.double() * (
            1 + NOISE * torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf.device)
        )

    shaken, _ = evaluate(model, tuple(tree_map(shake, inputs)), mode)
    return difference(shaken, expected)[1]


def _without_removed(statistics: Mapping[str, Tensor], record: Any) -> dict[str, Tensor]:
    """Running statistics without those of channels that the compilation removed."""
    removed = getattr(getattr(record, "plan", None), "removed", {})
    found = dict(statistics)
    for name, channels in removed.items():
        for buffer in (f"{name}.running_mean", f"{name}.running_var"):
            if buffer in found:
                found[buffer] = found[buffer][remaining(len(found[buffer]), channels.outputs)]
    return found


def _compare_statistics(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], limit: float) -> None:
    """Running statistics must hold the same values, in any order. A mean is measured against the spread beside it, for
    it may be zero up to rounding.
    """
    for name, buffer in expected.items():
        if name not in found:
            continue  # folded into a convolution
        spread = expected.get(name.replace("running_mean", "running_var"), buffer).abs().max().sqrt()
        scale = max(float(buffer.abs().max()), float(spread), torch.finfo(torch.float64).tiny)
        worst = float((found[name].sort().values - buffer.sort().values).abs().max()) / scale
        if not worst <= limit * 10:
            raise VerificationError(
                f"{name} differs after a step in training mode by {worst:.1e} of its scale (limit {limit * 10:.0e})"
            )


# --- where they differ first ------------------------------------------------------------------------------------------


def _first_difference(
    pruned: nn.Module, masked: nn.Module, inputs: tuple[Any, ...], mode: str, examples: tuple[Any, ...]
) -> str:
    """Name the first node of `pruned` whose values, in any order, are not those of the node of the same name in the
    masked model.
    """
    if not isinstance(pruned, fx.GraphModule):
        return "the first model is no graph, so the place is unknown"
    try:
        oracle = {name: summary for name, summary, _ in _summaries(trace(masked, examples).module, inputs, mode)}
        for name, summary, target in _summaries(pruned, inputs, mode):
            if name in oracle and not _alike(summary, oracle[name]):
                return f"the first node that differs is {name} ({target})"
    except (FxpruneError, RuntimeError) as error:
        return f"the place could not be found ({error})"
    return "no node differs in its set of values, so channels are out of order"


def _summaries(gm: fx.GraphModule, inputs: tuple[Any, ...], mode: str) -> Iterator[tuple[str, tuple[float, ...], Any]]:
    """Run a graph and yield, for each node that gives a tensor, numbers that do not depend on the order of its
    elements.
    """
    copy = _prepare(gm, mode, lazily=False)
    assert isinstance(copy, fx.GraphModule)
    found: list[tuple[str, tuple[float, ...], Any]] = []

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor) and value.is_floating_point():
                v = value.double()
                found.append(
                    (
                        n.name,
                        (  # no number of elements: removed channels are zero
                            float(v.sum()),
                            float(v.abs().sum()),
                            float(v.pow(2).sum()),
                            float(v.pow(3).sum()),
                        ),
                        n.target,
                    )
                )
            return value

    with torch.no_grad():
        Recorder(copy).run(*_as_double(inputs))
    yield from found


def _alike(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    scale = max(*(abs(x) for x in b), 1e-300)
    return all(abs(x - y) <= 1e-9 * scale for x, y in zip(a, b, strict=True))


__all__ = ["Verification", "difference", "evaluate", "verify"]
