"""Check that two models compute the same function, on copies, in evaluation and in training mode.

The check runs in float64, where reordering a sum changes a result by about 1e-16 of its terms, so that a difference
above 1e-10 of the largest output is a defect, not rounding (`fxprune.exact.precision` keeps casts inside forward from
leaving it). A model that amplifies such changes itself is measured: the limit grows with its response to noise of 1e-15
on the input. Where a model does not run in float64, it is checked in its own precision, against its own response to one
rounding step in inputs and weights; the result says so.
Training mode here means batch statistics in the normalisation layers; dropout and its kin stay off, for they draw by
position. A user's own module is compared as `.train()` leaves it, but for dropout, if it then gives the same twice.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.errors import VerificationError
from fxprune.exact.first_difference import first_difference
from fxprune.exact.precision import TRAINING, Precision, in_double, in_own
from fxprune.exact.record import find_record
from fxprune.graph.containers import convert_tensors, tensors_in
from fxprune.graph.copying import share_tensors, standing_for
from fxprune.graph.examples import Example, Inputs, as_examples
from fxprune.graph.recording import doubled
from fxprune.graph.tracing import check_is_module
from fxprune.graph.witness import kind_of
from fxprune.plans.masking import remaining

# Share of the largest output (design, section 5), and how far beyond its own response to rounding a model may go.
TOLERANCE = 1e-10
NOISE = 1e-15
NOISE_MARGIN = 1e3
LARGEST_LIMIT = 1e-3  # a model that chaotic cannot be told from another one
# In the model's own precision: how far beyond one rounding step, or its response to one, it may go.
OWN_MARGIN = 50
LARGEST_OWN_LIMIT = 0.1

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
        precision: `"float64"`, or the model's own, such as `"float32"`, where it does not run in float64.
        notes: what was not compared, or otherwise than usual, and why.
    """

    max_abs: float
    max_rel: float
    modes: tuple[str, ...]
    precision: str = "float64"
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = "" if self.precision == "float64" else f", in {self.precision}"
        return (
            f"equal in {' and '.join(self.modes)} mode{where}: "
            f"largest difference {self.max_abs:.1e} ({self.max_rel:.1e} of the largest output)"
            + "".join(f"; {note}" for note in self.notes)
        )


def verify(
    pruned: nn.Module, masked: nn.Module, example_inputs: Inputs, *, modes: Sequence[str] | None = None
) -> Verification:
    """Check that `pruned` computes what `masked` computes: all tensors in their outputs, wherever they sit, and what
    forward leaves in buffers.

    Both run in float64 on copies that share no state with them; the module docstring says what else is done.

    Args:
        pruned: the rewritten model.
        masked: the oracle.
        example_inputs: arguments of both, see `compile`, tensors on their device. A floating-point input without
            variation is replaced by noise, for it could hide errors, if the model runs on that.
        modes: which modes to compare; by default those that the compilation of `pruned` keeps, else both. A model whose
            forward differs between modes in structure is compiled for evaluation only.

    Raises:
        VerificationError: they differ, and the message names the first node of `pruned` where; or nothing could be
            compared.
    """
    check_is_module(masked)
    record = find_record(pruned)
    if modes is None:
        modes = getattr(record, "modes", ("eval", "train"))
    examples = as_examples(example_inputs, masked)
    largest_abs = largest_rel = 0.0
    compared: list[str] = []
    notes: list[str] = []
    precision = "float64"
    for mode, example in ((mode, example) for mode in modes for example in examples):
        try:
            oracle = _oracle(masked, example, mode, whole=not isinstance(pruned, fx.GraphModule))
        except VerificationError as error:
            if mode == "eval" or len(modes) == 1:
                raise
            notes.append(f"{mode} mode was not compared: {error}")
            continue
        worst_abs, worst_rel = _compare(pruned, masked, oracle, record)
        largest_abs, largest_rel = max(largest_abs, worst_abs), max(largest_rel, worst_rel)
        compared += [mode] if mode not in compared else []
        notes += [note for note in oracle.notes if note not in notes]
        if oracle.precision is in_own:
            precision = _own_type(masked)
    return Verification(largest_abs, largest_rel, tuple(compared), precision, tuple(notes))


@dataclass(frozen=True)
class _Oracle:
    """What the masked model gives.

    Attributes:
        mode: in which mode it ran.
        inputs: on what.
        precision: in which precision.
        run: what it gave.
        notes: what the user should know.
    """

    mode: str
    inputs: Example
    precision: Precision
    run: "Run"
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Run:
    """What one run of a model gave.

    Attributes:
        output: as forward returned it.
        tensors: those in the output, in order.
        state: the buffers that the run changed, by name, as they are after it.
    """

    output: Any
    tensors: list[Tensor]
    state: dict[str, Tensor]


def _oracle(masked: nn.Module, example: Example, mode: str, whole: bool) -> _Oracle:
    """Run the masked model, in float64 and on informative inputs if it can; in `"train"` mode as `.train()` leaves it,
    if `whole` and it gives the same twice, else with batch statistics only.

    Raises:
        VerificationError: it does not run, or gives nothing to compare.
    """
    # Batch statistics of one sample may not exist; two samples are a second choice, for forward may insist on one.
    candidates = [_informative(example), example] if any(map(_hides_errors, example.tensors)) else [example]
    if mode == "train":
        candidates += [twice for candidate in candidates if (twice := doubled(candidate)) is not None]
    failure: Exception | None = None
    if mode == "train" and whole and (oracle := _in_training(masked, candidates)) is not None:
        return oracle
    for precision in (in_double, in_own):
        for inputs in candidates:
            try:
                run = evaluate(masked, inputs, mode, precision)
            except Exception as error:  # user code may raise anything
                failure = failure or error
                continue
            if run.tensors and not any(bool(tensor.isfinite().any()) for tensor in run.tensors):
                failure = failure or VerificationError(
                    f"the output of the masked model has no finite value in {mode} mode, so nothing can be compared; "
                    "pass other example inputs, or repair the weights"
                )
                continue
            if not run.tensors:
                raise VerificationError(
                    f"the output of the masked model, a {type(run.output).__name__}, holds no tensor, so nothing can "
                    "be compared; let forward return what it computes"
                )
            notes = () if precision is in_double else (f"the model does not run in float64 ({_first_line(failure)})",)
            return _Oracle(mode, inputs, precision, run, notes)
    if isinstance(failure, VerificationError):
        raise failure
    raise VerificationError(
        f"the masked model does not run on the example inputs in {mode} mode: {_first_line(failure)}; pass inputs that "
        "it accepts"
    ) from failure


def _in_training(masked: nn.Module, candidates: Sequence[Example]) -> _Oracle | None:
    """What the masked model gives after `.train()`; None if it does not run so, or draws random numbers."""
    for inputs in candidates:
        runs = []
        for seed in (0, 1):
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                try:
                    runs.append(evaluate(masked, inputs, TRAINING, in_double))
                except Exception:  # user code may raise anything
                    break
        if len(runs) < 2 or not runs[0].tensors:
            continue
        if [t.shape for t in runs[0].tensors] != [t.shape for t in runs[1].tensors]:
            return None
        if difference(runs[0].tensors, runs[1].tensors)[1] == 0:
            return _Oracle(TRAINING, inputs, in_double, runs[0], ())
    return None


def _compare(pruned: nn.Module, masked: nn.Module, oracle: _Oracle, record: Any) -> tuple[float, float]:
    """Largest difference between what two models give, absolute and as a share of the largest output.

    Raises:
        VerificationError: it is too large, or the outputs are of different kinds.
    """
    mode, inputs, expected = oracle.mode, oracle.inputs, oracle.run
    try:
        found = evaluate(pruned, inputs, mode, oracle.precision)
    except Exception as error:
        raise VerificationError(
            f"the compiled model does not run where the masked model does, in {mode} mode: {_first_line(error)}; "
            "this is a defect of fxprune, please report it with the model"
        ) from error
    worst_abs, worst_rel = difference(found.tensors, expected.tensors)
    if (gives := kind_of(found.output)) != (should := kind_of(expected.output)):
        raise VerificationError(
            f"the compiled model returns a {gives}, the masked model a {should}; they do not belong together"
        )
    if oracle.precision is in_double:
        limit = max(TOLERANCE, ROUNDING_MARGIN * getattr(record, "rounding", 0.0))
        if worst_rel > limit:
            response = _response(masked, oracle, NOISE, weights=False)
            limit = max(limit, min(NOISE_MARGIN * response, LARGEST_LIMIT))
    else:
        step = max((torch.finfo(p.dtype).eps for p in masked.parameters() if p.is_floating_point()), default=NOISE)
        limit = OWN_MARGIN * step
        if worst_rel > limit:
            response = _response(masked, oracle, step, weights=True)
            limit = max(limit, min(OWN_MARGIN * response, LARGEST_OWN_LIMIT))
    if not worst_rel <= limit:
        where = first_difference(pruned, masked, inputs, mode, oracle.precision)
        raise VerificationError(
            f"the models differ in {mode} mode by {worst_rel:.1e} of the largest output "
            f"(limit {limit:.0e}); {where}. "
            "This is a defect of fxprune, or the models do not belong together; please report it with the model"
        )
    _compare_state(pruned, found.state, _without_removed(expected.state, record), limit, mode)
    return worst_abs, worst_rel


def evaluate(model: nn.Module, inputs: Example, mode: str, precision: Precision = in_double) -> Run:
    """Run a copy of `model` in `mode`; neither the model nor the inputs are changed."""
    output, copy = precision(model, inputs, mode)
    before = dict(model.named_buffers())
    changed = {
        name: buffer
        for name, buffer in copy.named_buffers()
        if name not in before or not torch.equal(buffer.double(), before[name].double())
    }
    return Run(output, tensors_in(output), changed)


def _first_line(error: Exception | None) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _own_type(model: nn.Module) -> str:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
    return str(dtype).removeprefix("torch.")


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


# --- inputs and state -------------------------------------------------------------------------------------------------


def _informative(inputs: Example) -> Example:
    """The inputs with noise in place of constants."""
    generator = torch.Generator().manual_seed(0)

    def improve(tensor: Tensor) -> Tensor:
        if not _hides_errors(tensor):
            return tensor.detach()
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)

    return convert_tensors(inputs, improve)


def _hides_errors(tensor: Tensor) -> bool:
    """Whether an input has no variation, so that channels out of order could give the same."""
    return tensor.is_floating_point() and tensor.numel() > 1 and bool((tensor == tensor.reshape(-1)[0]).all())


def _response(model: nn.Module, oracle: _Oracle, step: float, *, weights: bool) -> float:
    """Relative change of the output when each number of the input, and of the weights if asked for, changes by about
    `step` of itself: how far rounding alone can move this model.
    """
    generator = torch.Generator().manual_seed(1)

    def shake(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
        shaken = tensor.detach().double() * (1 + step * noise)
        return shaken if oracle.precision is in_double else shaken.to(tensor.dtype)

    if weights:
        model = share_tensors(model, lambda tensor: standing_for(tensor, shake(tensor).clone()))
    shaken = evaluate(model, convert_tensors(oracle.inputs, shake), oracle.mode, oracle.precision)
    return difference(shaken.tensors, oracle.run.tensors)[1]


def _without_removed(state: Mapping[str, Tensor], record: Any) -> dict[str, Tensor]:
    """Buffers without the entries of channels that the compilation removed."""
    removed = getattr(getattr(record, "plan", None), "removed", {})
    found = dict(state)
    for name, buffer in state.items():
        owner, _, attribute = name.rpartition(".")
        statistic = attribute in ("running_mean", "running_var")
        channels = removed.get(name) or (removed.get(owner) if statistic else None)
        if channels is not None and buffer.dim():
            found[name] = buffer[remaining(len(buffer), channels.outputs).to(buffer.device)]
    return found


def _compare_state(
    pruned: nn.Module, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], limit: float, mode: str
) -> None:
    """What forward left in buffers must be the same values, in any order. A mean is measured against the spread beside
    it, for it may be zero up to rounding.
    """
    own = dict(pruned.named_buffers())
    for name, buffer in expected.items():
        if name not in own and name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            continue  # folded into a convolution
        now = found.get(name, own.get(name))
        if now is None or now.shape != buffer.shape:
            raise VerificationError(
                f"{name}: forward of the masked model writes into this buffer, and the compiled model has "
                f"{'no such buffer' if now is None else f'one of shape {tuple(now.shape)}'}; "
                "this is a defect of fxprune, please report it with the model"
            )
        a, b = now.double().reshape(-1).sort().values, buffer.double().reshape(-1).sort().values
        spread = expected.get(name.replace("running_mean", "running_var"), buffer).double().abs().max().sqrt()
        scale = max(float(b.abs().max()), float(spread), torch.finfo(torch.float64).tiny)
        worst = float((a - b).abs().max()) / scale
        if not worst <= limit * 10:
            when = "a step in training mode" if mode == "train" else "a run"
            raise VerificationError(f"{name} differs after {when} by {worst:.1e} of its scale (limit {limit * 10:.0e})")


__all__ = ["Verification", "difference", "evaluate", "verify"]
