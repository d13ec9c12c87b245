"""Capture a model as a `torch.fx` graph without touching it, and without freezing its training mode.

Three things that `torch.fx.symbolic_trace` does not do:

1. *Leaves.* Every convolution, normalisation and linear layer stays one node, subclasses included. A module whose
   forward cannot be traced (control flow on shapes, say) becomes a leaf too, innermost first, so that the rest of the
   model is still captured.
2. *Modes.* The model is traced in evaluation and in training mode and the graphs are compared. A literal that differs,
   such as the last argument of `F.dropout(x, p, self.training)`, becomes a `TrainingFlag`; a module without layers of
   its own whose operators differ (`DropPath`) becomes a leaf.
3. *Shapes.* They are computed on meta tensors, so that they cost next to nothing.
"""

import copy
import inspect
import operator
import typing
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from fxprune.errors import TraceError
from fxprune.graph.convolutions import Convolution
from fxprune.graph.copying import copied, share_tensors
from fxprune.graph.examples import Inputs, as_inputs, positional_parameters
from fxprune.graph.memory import written_attributes
from fxprune.graph.modes import compare_modes, insert_training_flags, restore_modes
from fxprune.graph.tracer import LEAVES, Tracer
from fxprune.graph.values import first_line, meta_values, propagate


@dataclass(frozen=True)
class Trace:
    """A captured model.

    Attributes:
        module: the graph with its own module tree. Parameters and buffers are *shared* with the traced model.
        values: what each node gives for `inputs`: meta tensors in place of tensors, otherwise plain values. A node
            whose value is unknown is absent.
        inputs: the arguments of forward, from the example or from a probe: meta tensors, or copies of the real ones
            where forward reads data; empty if no probe fits.
        probed: True if no example was given and `inputs` was found by trying.
        opaque: modules that could not be traced and stay whole, with the reason.
        modes: `("eval", "train")`, or `("eval",)` if the forward differs in structure between the modes; the graph then
            follows evaluation.
        notes: what the user should know, one sentence each.
    """

    module: fx.GraphModule
    values: Mapping[fx.Node, Any]
    inputs: tuple[Any, ...]
    probed: bool
    opaque: Mapping[str, str]
    modes: tuple[str, ...]
    notes: tuple[str, ...] = ()


def trace(model: nn.Module, example_inputs: Inputs | None = None, *, partial: bool = True) -> Trace:
    """Trace `model` into a graph.

    Args:
        model: any module; it is not changed, and neither are the attributes it keeps beside its parameters.
        example_inputs: positional arguments of `model.forward`, tensors of any device. Arguments with a default that
            the example leaves out keep their default for good. Without an example, a single tensor input is probed with
            usual image sizes.
        partial: whether modules with layers that cannot be traced may stay whole; False ends at the first.

    Returns:
        The trace. Its modules share parameters and buffers with `model`, but for those that running it changes.

    Raises:
        TraceError: the top-level forward cannot be traced; the message names the submodules that can. Or a lazy module
            has no parameters yet, or, unless `partial`, a module with layers cannot be traced.
    """
    check_is_model(model)
    examples = None if example_inputs is None else as_inputs(example_inputs, model)
    fixed = _fixed_arguments(model, examples)
    tensors = _tensor_arguments(model, examples)
    with torch.inference_mode(False):
        scratch = copied(model)  # forward may write into buffers and parameters while it is traced
    leaves: dict[str, str] = {}
    while True:
        known = set(leaves)
        (evaluation, traced), (training, _) = (
            _trace_in_mode(scratch, mode, leaves, fixed, tensors, partial) for mode in (False, True)
        )
        flags, divergent = compare_modes(evaluation, training)
        fresh = {
            name: "its operators differ between training and evaluation"
            for name in divergent
            if _can_be_leaf(model, name)
        }
        leaves |= fresh
        if leaves.keys() == known:  # one that only training cannot trace is a leaf of both graphs
            break

    root = share_tensors(model)
    graph = evaluation
    for node in graph.nodes:
        if node.op == "get_attr" and node.target.startswith("_tensor_constant") and not hasattr(root, node.target):
            root.register_buffer(node.target, getattr(traced, node.target))  # made while the forward ran
    if not divergent:
        insert_training_flags(root, graph, flags)
    _drop_fixed_arguments(graph, fixed)
    hints = _argument_types(model)
    for node in graph.nodes:
        if node.op == "output":
            node.type = None  # a return annotation such as GoogLeNetOutputs cannot be scripted
        elif node.op == "placeholder" and isinstance(node.type, str):
            node.type = hints.get(str(node.target))  # fx would write the string "Tensor" as a type named _Tensor_
    module = fx.GraphModule(root, graph, class_name=type(model).__name__)
    restore_modes(module, root)
    _own_state(module, leaves)

    notes = (
        ["channels of modules that could not be traced keep their order: " + ", ".join(sorted(leaves))]
        if _has_layers(root, leaves)
        else []
    )
    if hooked := _hooked_containers(model, leaves):
        notes.append(
            "hooks ran once, while the model was traced, and the graph has what they did to values, nothing else: "
            + ", ".join(hooked)
        )
    if divergent:
        where = ", ".join(name or "the model itself" for name in sorted(divergent))
        notes.append(
            f"the forward of {where} differs between training and evaluation mode; "
            "the compiled graph follows evaluation"
        )
    values, inputs = propagate(module, examples)
    return Trace(
        module=module,
        values=values,
        inputs=inputs,
        probed=examples is None,
        opaque=leaves,
        modes=("eval",) if divergent else ("eval", "train"),
        notes=tuple(notes),
    )


def check_is_model(model: object) -> None:
    """See that what was passed is a model that can be captured.

    Raises:
        TraceError: it is something around a model, or made from one, or not initialized yet.
    """
    if said := _why_no_model(model):
        raise TraceError(said)
    assert isinstance(model, nn.Module)
    for name, layer in model.named_modules():
        if any(is_lazy(parameter) for parameter in layer.parameters(recurse=False)):
            raise TraceError(
                f"{name or 'the model'}: {type(layer).__name__} is not initialized yet; run the model once first"
            )


def check_is_module(model: object) -> None:
    """See that what was passed is a module at all, for what also takes compiled and scripted ones.

    Raises:
        TraceError: it is not.
    """
    if not isinstance(model, nn.Module):
        raise TraceError(_why_no_module(model))


def trace_leaf(
    module: nn.Module, training: bool, inputs: tuple[Any, ...]
) -> tuple[fx.GraphModule, dict[fx.Node, Any]] | None:
    """Trace one module in one mode, with its values on the meta tensors `inputs`; None if it cannot be traced or does
    not run on them.
    """
    root = share_tensors(module).train(training)
    try:
        graph_module = fx.GraphModule(root, Tracer().trace(root))
    except Exception:  # any failure of user code means the same here: the module stays whole
        return None
    values, error = meta_values(graph_module, inputs)
    return None if error else (graph_module, values)


def is_hooked(module: nn.Module) -> bool:
    """Return whether calling `module` runs more than its forward: hooks, or a parametrized (computed) weight."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or nn.utils.parametrize.is_parametrized(module)


# --- graphs -----------------------------------------------------------------------------------------------------------


def _trace_in_mode(
    model: nn.Module,
    training: bool,
    leaves: dict[str, str],
    fixed: Mapping[str, Any],
    tensors: Collection[str],
    partial: bool,
) -> tuple[fx.Graph, nn.Module]:
    """Trace a fresh copy in one mode until it succeeds. Where forward of a module raises, its buffers become constants,
    for they may be what it decides by; where that does not help, or it writes into them, it becomes a leaf (added to
    `leaves`).
    """
    frozen: list[str] = []
    while True:
        tracer = Tracer(leaves, frozen, tensors)
        root = share_tensors(model).train(training)
        written = _versions(root, frozen)
        try:
            graph = tracer.trace(root, concrete_args=dict(fixed))
        except Exception as cause:
            failed = tracer.failed or ""  # the model itself
            if failed not in frozen and any(True for _ in root.get_submodule(failed).buffers()):
                frozen.append(failed)
                continue
            if not partial and (not failed or _has_layers(root, [failed])):
                where = failed or type(model).__name__
                raise TraceError(f"{where} cannot be traced ({first_line(cause)})") from cause
            if not failed or failed in leaves:
                raise TraceError(_untraceable(model, cause)) from cause
            leaves[failed] = f"its forward cannot be traced ({first_line(cause)})"
            continue
        changed = next((path for path, before in written.items() if _versions(root, [path])[path] != before), None)
        if changed is None:
            return graph, root
        if not changed:
            raise TraceError(
                f"{type(model).__name__} cannot be traced as a whole: its forward writes into buffers whose values it "
                "also looks at; move that into a submodule"
            )
        frozen.remove(changed)
        leaves[changed] = "its forward writes into buffers whose values it also looks at"


def _own_state(module: fx.GraphModule, leaves: Iterable[str]) -> None:
    """Give the graph its own copy of what running it changes: the tensors that it writes into, and the buffers of
    modules that stay whole. All others it shares with the model.
    """
    written = {str(node.target) for node in written_attributes(module)}
    for path in leaves:
        written |= {f"{path}.{name}" for name, _ in module.get_submodule(path).named_buffers()}
    for name in written:
        owner, _, attribute = name.rpartition(".")
        holder = module.get_submodule(owner)
        for store in (holder._parameters, holder._buffers):
            if (tensor := store.get(attribute)) is not None:
                store[attribute] = copy.deepcopy(tensor)  # type: ignore[assignment]  # a parameter stays one


def _versions(root: nn.Module, paths: Iterable[str]) -> dict[str, list[int]]:
    """How often the buffers of some modules have been written into."""
    return {path: [buffer._version for buffer in root.get_submodule(path).buffers()] for path in paths}


def _untraceable(model: nn.Module, cause: Exception) -> str:
    children = [
        name
        for name, child in model.named_children()
        if any(isinstance(m, Convolution) for m in child.modules()) and _is_traceable(child)
    ]
    said = first_line(cause)
    way_out = (
        "compile a submodule and put it back, for example `model.{0} = fxprune.compile(model.{0})`; "
        "traceable here: {1}".format(children[0], ", ".join(children))
        if children
        else "none of its submodules with convolutions can be traced on its own either"
    )
    return f"{type(model).__name__} cannot be traced as a whole: {said}; {way_out}"


def _is_traceable(module: nn.Module) -> bool:
    try:
        Tracer().trace(copied(module).eval())
    except Exception:  # any failure of user code means the same here: not traceable
        return False
    return True


def _fixed_arguments(model: nn.Module, examples: tuple[Any, ...] | None) -> dict[str, Any]:
    """Arguments of forward that keep their default value: all that have one, except those the example fills."""
    signature = inspect.signature(model.forward).parameters.values()
    parameters = positional_parameters(model)
    keywords = [p for p in signature if p.kind is p.KEYWORD_ONLY]
    given = 0 if examples is None else len(examples)
    return {p.name: p.default for p in (*parameters[given:], *keywords) if p.default is not p.empty}


def _why_no_model(model: object) -> str:
    """Why what was passed is no model to trace but something around it, or that it was made from; else nothing."""
    name = type(model).__name__
    if isinstance(model, torch.export.ExportedProgram) or _is_exported(model):
        return f"{name} is what torch.export made: its convolutions are operators and no layers; pass the model itself"
    if not isinstance(model, nn.Module):
        return _why_no_module(model)
    if isinstance(model, torch.jit.ScriptModule):
        return f"{name} is TorchScript, which has no Python forward to trace; pass the model that it was made from"
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return f"{name} runs a model on several devices; pass the model inside, which is its attribute `module`"
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        return f"{name} is what torch.compile made; pass the model inside, which is its attribute `_orig_mod`"
    return ""


def _why_no_module(model: object) -> str:
    name = type(model).__name__
    if isinstance(model, str | PurePath):
        return (
            f"the model is {str(model)!r}, a name or path and no module; build it first, as in "
            "torchvision.models.resnet18(weights='DEFAULT'), or use the command line, which takes names"
        )
    if isinstance(model, Mapping) and any(isinstance(value, torch.Tensor) for value in model.values()):
        return (
            f"the model is a {name} of tensors, a state dict, which are weights without their network; build the "
            "network and give it these with load_state_dict"
        )
    made = "call it first" if callable(model) else "pass a torch.nn.Module"
    return f"the model is a {name} and no module; {made}"


def _is_exported(model: object) -> bool:
    """Whether a model is the module of an exported program."""
    return isinstance(model, fx.GraphModule) and any(
        isinstance(node.target, torch._ops.OpOverload) and "conv" in str(node.target) for node in model.graph.nodes
    )


def _tensor_arguments(model: nn.Module, examples: tuple[Any, ...] | None) -> frozenset[str]:
    """Names of the arguments of forward that are tensors: by the example, or else all without a default."""
    parameters = positional_parameters(model)
    if examples is None:
        return frozenset(p.name for p in parameters if p.default is p.empty)
    return frozenset(p.name for p, value in zip(parameters, examples, strict=False) if isinstance(value, Tensor))


def _hooked_containers(model: nn.Module, leaves: Collection[str]) -> list[str]:
    """Modules that are traced inside and have hooks."""
    return [
        name or "the model itself"
        for name, module in model.named_modules()
        if (module._forward_hooks or module._forward_pre_hooks)
        and not isinstance(module, LEAVES)
        and not any(name == leaf or name.startswith(f"{leaf}.") for leaf in leaves)
        and any(isinstance(inner, LEAVES) for inner in module.modules())
    ]


def _argument_types(model: nn.Module) -> dict[str, Any]:
    """Annotations of forward, with those that are strings (`from __future__ import annotations`) evaluated; empty if
    one names what is not there at run time.
    """
    try:
        return typing.get_type_hints(model.forward)
    except Exception:  # an annotation may be any expression
        return {}


def _drop_fixed_arguments(graph: fx.Graph, fixed: Mapping[str, Any]) -> None:
    """Remove the placeholders that tracing leaves behind for fixed arguments, with the assertions on them."""
    for node in list(graph.nodes):
        if (
            node.op != "placeholder"
            or not any(node.target.rpartition("_")[0] == name for name in fixed)
            or node.target in fixed
        ):
            continue
        checks = [node]
        for check in checks:
            checks.extend(user for user in check.users if user not in checks)
        if any(check.op == "output" or (check is not node and check.target not in _CHECKS) for check in checks):
            continue  # the argument is used after all
        for check in reversed(checks):
            graph.erase_node(check)


_CHECKS = (operator.eq, torch._assert, fx._symbolic_trace._assert_is_none)


def _can_be_leaf(model: nn.Module, name: str) -> bool:
    return name != "" and not any(isinstance(m, LEAVES) for m in model.get_submodule(name).modules())


def _has_layers(root: nn.Module, names: Iterable[str]) -> bool:
    return any(isinstance(m, LEAVES) for name in names for m in root.get_submodule(name).modules())
