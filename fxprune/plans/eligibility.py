"""Which convolutions can be regrouped exactly and are worth it, and why the others stay dense."""

from collections.abc import Set

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from fxprune.errors import PlanError
from fxprune.graph.convolutions import Convolution, convolutions, has_own_forward
from fxprune.graph.editing import calls, first_reader, read_by_name
from fxprune.graph.tracing import Trace, is_hooked

# Narrower convolutions stay dense. Below 16 input channels (an RGB stem) there is little to remove and every kernel
# matters; below 16 filters even two groups are narrower than the 8 lanes of an AVX2 register, and measured slower than
# the dense convolution (1 thread, oneDNN 3.13: 2.2 to 5.4 times the dense time at 2 to 4 filters a group).
MIN_IN_CHANNELS = 16
MIN_OUT_CHANNELS = 16

# Subclasses whose forward only pads and then convolves with `self.weight` and `self.groups`, so regrouping is exact.
EXACT_SUBCLASSES = frozenset({"timm.layers.conv2d_same.Conv2dSame"})

MOST_FEATURES = 4096
"""Input features of a linear layer that may be solved anew: the least squares problem has as many unknowns."""

QUANTIZED_PACKAGES = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.nn.quantized")


def skip_reason(module: nn.Module, shared_parameters: Set[int] = frozenset()) -> str:
    """Why a module stays dense by default, or `""` if it is a convolution that can be pruned.

    Args:
        module: a module with initialized parameters.
        shared_parameters: `id` of each parameter that several modules own, see `parameters_of_several_modules`.
    """
    if not isinstance(module, Convolution):
        return f"{type(module).__name__} is not a convolution"
    if reason := obstacle_of(module, shared_parameters):
        return reason
    if module.in_channels < MIN_IN_CHANNELS:
        return f"too few input channels ({module.in_channels} < {MIN_IN_CHANNELS})"
    if module.out_channels < MIN_OUT_CHANNELS:
        return f"too few filters ({module.out_channels} < {MIN_OUT_CHANNELS})"
    return ""


def obstacle_of(conv: Convolution, shared_parameters: Set[int] = frozenset()) -> str:
    """Why the weight of a convolution must stay what it is, or `""`; see `skip_reason`."""
    if "forward" in vars(conv) or "_conv_forward" in vars(conv):
        return "its forward was replaced; only plain convolutions can be regrouped exactly"
    if computes_its_own_forward(type(conv)):
        return (
            f"subclass {type(conv).__name__} computes its own forward; only plain convolutions can be regrouped exactly"
        )
    if parametrize.is_parametrized(conv):
        return "is parametrized, its weight is computed; make it a plain one with bake=True"
    if conv._forward_pre_hooks or conv._forward_hooks:
        return "has forward hooks, which may change its weight, input or output; remove them first"
    if conv.groups == conv.in_channels and conv.groups > 1:
        return "is depthwise already"
    if conv.groups > 1:
        return f"is grouped already (groups={conv.groups})"
    if id(conv.weight) in shared_parameters:
        return "shares its weight with another module"
    if not conv.weight.is_floating_point():  # quantized, integer and complex types
        return f"its weight is {conv.weight.dtype}, not floating point"
    return ""


def check_weight(name: str, weight: Tensor) -> None:
    """See that a weight has values that can be compared.

    Raises:
        PlanError: the weight is on the meta device, or holds NaN or infinity.
    """
    if weight.is_meta:
        raise PlanError(f"{name}: the weight is on the meta device and has no values; load the weights before planning")
    if wrong := count_not_finite(weight):
        raise PlanError(
            f"{name}: {wrong} of {weight.numel()} weights are NaN or infinite; repair them, or leave the layer alone "
            f"with ignore=({name!r},)"
        )


def count_not_finite(tensor: Tensor) -> int:
    """How many entries are NaN or infinite.

    One such entry makes the sum so too, and a sum costs a third of a look at each entry.
    """
    if bool(tensor.sum().isfinite()):
        return 0
    return int(tensor.numel() - torch.isfinite(tensor).sum())


def check_model(model: nn.Module) -> None:
    """See that the modules of a model are in a state from which one can plan.

    Raises:
        PlanError: naming the first module that is quantized or whose parameters are not initialized.
    """
    for name, module in model.named_modules():
        if type(module).__module__.startswith(QUANTIZED_PACKAGES):
            raise PlanError(
                f"{name or 'the model'}: {type(module).__name__} is quantized; prune the floating-point model first "
                "and quantize the result"
            )
        if any(is_lazy(parameter) for parameter in module.parameters(recurse=False)):
            raise PlanError(
                f"{name or 'the model'}: {type(module).__name__} is not initialized yet; run the model once first"
            )


def parameters_of_several_modules(model: nn.Module) -> Set[int]:
    """The `id` of each parameter that more than one distinct module owns."""
    seen: set[int] = set()
    several: set[int] = set()
    for module in model.modules():  # a module that is called twice is visited once
        for parameter in {id(parameter) for parameter in module.parameters(recurse=False)}:
            (several if parameter in seen else seen).add(parameter)
    return several


def computes_its_own_forward(kind: type[Convolution]) -> bool:
    """Whether a convolution does more than pad and convolve with its weight, as torch's own do."""
    if f"{kind.__module__}.{kind.__qualname__}" in EXACT_SUBCLASSES:
        return False
    return has_own_forward(kind)


def find_obstacles(model: nn.Module, traced: Trace) -> dict[str, str]:
    """Convolutions that the traced graph does not allow to be grouped, with the reason."""
    called = {str(node.target): conv for node, conv in calls(traced.module, Convolution)}
    named = read_by_name(traced.module)
    obstacles = {}
    for name in convolutions(model):
        whole = next((path for path in traced.opaque if name.startswith(f"{path}.")), None)
        if whole is not None:
            obstacles[name] = f"inside {whole}: {traced.opaque[whole]}"
        elif name not in called:
            obstacles[name] = "the traced graph never calls it"
        elif reader := first_reader(called[name].parameters(), named):
            obstacles[name] = f"its parameters are also read by {reader}, which needs them dense"
    return obstacles


def refittable_linears(model: nn.Module, traced: Trace) -> dict[str, nn.Linear]:
    """The linear layers of a traced model that can be solved anew, by module path: plain ones, called by the graph,
    whose parameters nobody else reads, of at most `MOST_FEATURES` input features.
    """
    shared, named = parameters_of_several_modules(model), read_by_name(traced.module)
    found = {}
    for node, layer in calls(traced.module, nn.Linear):
        value, parameters = traced.values.get(node), list(layer.parameters(recurse=False))
        if (
            type(layer) is nn.Linear
            and not is_hooked(layer)
            and "forward" not in vars(layer)
            and layer.weight.is_floating_point()
            and layer.in_features <= MOST_FEATURES
            and not any(id(parameter) in shared for parameter in model.get_submodule(str(node.target)).parameters())
            and not first_reader(parameters, named)
            and isinstance(value, Tensor)
            and value.dim() > 1
        ):
            found[str(node.target)] = layer
    return found
