"""Weights that forward computes anew in each call, as plain parameters.

Weight normalisation, spectral normalisation and the masks of `torch.nn.utils.prune` are known by name. A subclass that
standardises its weight, or computes it in another way, is watched as it runs: if it makes one call of a convolution,
with the same weight whatever it is given, and gives what a plain convolution with that weight gives, it becomes that.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode

from fxprune.graph.contexts import undisturbed
from fxprune.graph.convolutions import PLAIN, Convolution, convolutions, has_own_forward, torch_class
from fxprune.graph.copying import copied

# Of the largest output, in float64: the same operations in another order.
TOLERANCE = 1e-10


def baked(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """A copy of a model in which the convolutions whose weight is computed have it as a plain parameter, as it is in
    evaluation mode, and the names of these.

    Trained further, such a weight is free: it is no longer normalised. What cannot be baked stays as it is.
    """
    model = copied(model)
    replaced: dict[nn.Module, nn.Module] = {}
    for conv in convolutions(model).values():
        plain = _without_hooks(conv)
        if plain is None or type(plain).forward is not torch_class(type(plain)).forward:
            plain = _as_it_runs(conv if plain is None else plain) or plain
        if plain is not None:
            replaced[conv] = plain
    for module in model.modules():
        for name, child in module._modules.items():
            if child in replaced:
                module._modules[name] = replaced[child]
    return model, tuple(name for name, conv in convolutions(model).items() if conv in replaced.values())


def _without_hooks(conv: Convolution) -> Convolution | None:
    """The convolution itself, in place, without what computes its weight by a name that torch gives it; None if there
    is none.
    """
    training, found = conv.training, False
    conv.eval()  # spectral normalisation takes a step in training mode
    with torch.no_grad():
        if parametrize.is_parametrized(conv):
            _remove_parametrizations(conv)
            found = True
        for hook in list(conv._forward_pre_hooks.values()):
            if type(hook).__module__ in _REMOVE:
                _REMOVE[type(hook).__module__](conv, hook)
                _forget_loading(conv)
                found = True
            elif isinstance(hook, prune.BasePruningMethod):
                prune.remove(conv, hook._tensor_name)  # type: ignore[no-untyped-call]
                found = True
    conv.train(training)
    return conv if found else None


def _forget_loading(conv: Convolution) -> None:
    """Remove the hooks of spectral normalisation that look for its vectors in a state dict: torch leaves them."""
    for hooks in (conv._load_state_dict_pre_hooks, conv._state_dict_hooks):
        for key, hook in list(hooks.items()):
            if type(getattr(hook, "hook", hook)).__module__ == nn.utils.spectral_norm.__module__:
                del hooks[key]


def _remove_parametrizations(conv: Convolution) -> None:
    """What `parametrize.remove_parametrizations` does, which would also take the weight from the class that copies of
    a parametrized module share with the original.
    """
    names = list(conv.parametrizations)  # type: ignore[arg-type]  # a ModuleDict
    values = {name: getattr(conv, name).detach().clone() for name in names}
    learns = any(parameter.requires_grad for parameter in conv.parametrizations.parameters())  # type: ignore[union-attr]
    del conv._modules["parametrizations"]
    conv.__class__ = type(conv).__bases__[0]
    for name, value in values.items():
        conv.register_parameter(name, nn.Parameter(value, requires_grad=learns))


_REMOVE: dict[str, Callable[[nn.Module, Any], Any]] = {
    "torch.nn.utils.weight_norm": lambda conv, hook: nn.utils.remove_weight_norm(conv, hook.name),
    "torch.nn.utils.spectral_norm": lambda conv, hook: nn.utils.remove_spectral_norm(conv, hook.name),
}


def _as_it_runs(conv: Convolution) -> Convolution | None:
    """A plain convolution that computes what a subclass computes, if it has a forward of its own and there is one."""
    if torch_class(type(conv)) not in PLAIN or not has_own_forward(type(conv)):
        return None
    if conv._forward_hooks or conv._forward_pre_hooks:
        return None
    try:
        with undisturbed(), torch.no_grad():
            if not _runs_as_plain(conv):
                return None
            (weight,) = _weights(copy.deepcopy(conv).eval(), _example(conv))
            return _plain(conv, weight)
    except Exception:  # a forward that takes something else, or cannot be copied: it stays
        return None


def _runs_as_plain(conv: Convolution) -> bool:
    """Whether it gives, in both modes and for two inputs, what a plain convolution with one weight gives."""
    double, x = copy.deepcopy(conv).double(), _example(conv).double()
    seen = []
    for training in (False, True):
        for given in (x, 2 * x + 1):
            (weight,) = _weights(double.train(training), given)
            seen.append(weight)
            found, expected = double(given), _plain(double, seen[0])(given)
            if found.shape != expected.shape or (found - expected).abs().max() > TOLERANCE * expected.abs().max():
                return False
    return all(weight.shape == conv.weight.shape and torch.equal(weight, seen[0]) for weight in seen)


def _example(conv: Convolution) -> Tensor:
    """A batch of two that is a little larger than the kernel."""
    space = [(k - 1) * d + 4 for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
    x = torch.randn(2, conv.in_channels, *space, generator=torch.Generator().manual_seed(0))
    return x.to(conv.weight.device, conv.weight.dtype)


def _weights(conv: Convolution, x: Tensor) -> list[Tensor]:
    """The weights of the calls of convolutions that a call makes."""
    watch = _Watch()
    with watch:
        conv(x)
    return watch.weights


class _Watch(TorchFunctionMode):
    """Keeps the weight of each call of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.conv1d, torch.conv2d, torch.conv3d):
            self.weights.append((args[1] if len(args) > 1 else kwargs["weight"]).detach().clone())
        return func(*args, **kwargs)


_SETTINGS = (
    "in_channels out_channels kernel_size stride padding dilation transposed output_padding groups padding_mode "
    "_reversed_padding_repeated_twice training"
).split()


def _plain(conv: Convolution, weight: Tensor) -> Convolution:
    kind = torch_class(type(conv))
    plain = kind.__new__(kind)
    nn.Module.__init__(plain)
    assert isinstance(plain, Convolution)
    for name in _SETTINGS:
        setattr(plain, name, getattr(conv, name))
    plain.weight = nn.Parameter(weight, requires_grad=any(p.requires_grad for p in conv.parameters()))
    plain.register_parameter("bias", conv._parameters.get("bias"))
    return plain
