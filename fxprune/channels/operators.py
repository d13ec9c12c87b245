"""Which operator follows which rule: tables by function, by method name and by qualified class name.

What is in no table is a boundary: its channels keep their order, and the report says so.
"""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fxprune.channels.rules import (
    Rule,
    cast,
    channel_argument,
    channel_scale,
    concatenate,
    constant,
    convolution,
    dimensionwise,
    elementwise,
    expand,
    functional_affine,
    functional_convolution,
    gated,
    gather,
    group_norm,
    group_norm_with_zeros,
    item,
    layer_norm,
    layer_norm_with_zeros,
    linear,
    named_item,
    pad,
    reduce,
    repeat,
    reshape,
    stack,
    unpool,
    windows,
)


def _named(names: str, *places: Any) -> list[Any]:
    """The functions called so in torch, torch.nn.functional, operator and beside them, in all spellings (relu, relu_,
    iadd).
    """
    found = []
    for name in names.split():
        for place in (torch, F, operator, torch._C._nn, torch.special, *places):
            for spelling in (name, f"{name}_", f"i{name}") if place is operator else (name, f"{name}_"):
                function = getattr(place, spelling, None)
                if callable(function):
                    found.append(function)
    return found


_POINTWISE = (
    "abs add sub rsub mul div divide multiply subtract true_divide truediv floordiv floor_divide pow neg "
    "exp expm1 log log1p log2 sqrt rsqrt square reciprocal sin cos tanh sigmoid erf "
    "relu relu6 leaky_relu elu celu selu silu gelu mish hardswish hardsigmoid hardtanh softplus softsign logsigmoid "
    "threshold hardshrink softshrink tanhshrink dropout dropout1d dropout2d dropout3d alpha_dropout "
    "clamp clip maximum minimum where lerp addcmul addcdiv round floor ceil sign nan_to_num "
    "eq ne lt le gt ge logical_and logical_or logical_not isnan pos"
)
_POINTWISE_METHODS = (
    _POINTWISE + " contiguous clone detach float half double bfloat16 cpu cuda masked_fill requires_grad"
)
_MOVEMENT = (
    "permute transpose swapaxes swapdims movedim moveaxis unsqueeze squeeze "
    "chunk split tensor_split unbind select narrow flip t"
)
_RESHAPES = "view reshape flatten unflatten pixel_shuffle pixel_unshuffle channel_shuffle view_as reshape_as roll"
_REDUCTIONS = "mean sum amax amin std var norm logsumexp prod max min"
_CONSTANTS = "zeros ones full zeros_like ones_like empty_like full_like rand_like randn_like"
_CONSTANT_METHODS = "new_zeros new_ones new_empty new_full bernoulli bernoulli_"
_AFFINE = {"running_mean": 1, "running_var": 2, "weight": 3, "bias": 4}

FUNCTIONS: dict[Any, Rule] = {
    **dict.fromkeys(_named(_POINTWISE), elementwise),
    **dict.fromkeys(_named(_MOVEMENT), dimensionwise),
    **dict.fromkeys(_named(_RESHAPES), reshape),
    **dict.fromkeys(_named(_REDUCTIONS), reduce),
    **dict.fromkeys(_named(_CONSTANTS), constant),
    **dict.fromkeys(_named("softmax log_softmax normalize"), channel_argument),
    **dict.fromkeys(_named("cat concat concatenate"), concatenate),
    **dict.fromkeys(_named("stack"), stack),
    **dict.fromkeys(_named("glu"), gated),
    **dict.fromkeys(_named("interpolate upsample"), windows(None)),
    **dict.fromkeys(_named("max_pool1d avg_pool1d adaptive_avg_pool1d adaptive_max_pool1d lp_pool1d"), windows(1)),
    **dict.fromkeys(_named("max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d lp_pool2d"), windows(2)),
    **dict.fromkeys(_named("max_pool3d avg_pool3d adaptive_avg_pool3d adaptive_max_pool3d"), windows(3)),
    **{
        function: windows(n)
        for n in (1, 2, 3)
        for function in _named(
            f"max_pool{n}d_with_indices adaptive_max_pool{n}d_with_indices fractional_max_pool{n}d_with_indices"
        )
    },
    **{function: unpool(n) for n in (1, 2, 3) for function in _named(f"max_unpool{n}d")},
    **dict.fromkeys(_named("conv1d conv2d conv3d"), functional_convolution),
    F.pad: pad,
    operator.getitem: item,
    getattr: named_item,
    F.batch_norm: functional_affine(_AFFINE, 1),
    F.layer_norm: functional_affine({"weight": 2, "bias": 3}, -1),
    F.group_norm: functional_affine({"num_groups": 1, "weight": 2, "bias": 3}, 1),
    F.instance_norm: functional_affine(_AFFINE, 1),
    F.prelu: functional_affine({"weight": 1}, 1),
}

# Keyed by qualified name, so that libraries need not be imported.
_LIBRARY_FUNCTIONS: dict[str, Rule] = {"torchvision.ops.stochastic_depth.stochastic_depth": elementwise}

METHODS: dict[str, Rule] = {
    **{
        spelling: elementwise
        for name in _POINTWISE_METHODS.split()
        for spelling in (name, f"{name}_", f"__{name}__", f"__i{name}__")
    },
    **dict.fromkeys(_MOVEMENT.split(), dimensionwise),
    **dict.fromkeys(_RESHAPES.split(), reshape),
    **dict.fromkeys(_REDUCTIONS.split(), reduce),
    **dict.fromkeys(_CONSTANT_METHODS.split(), constant),
    **dict.fromkeys(("softmax", "log_softmax"), channel_argument),
    **dict.fromkeys(("to", "type", "type_as"), cast),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), expand),
    "repeat": repeat,
    "prelu": functional_affine({"weight": 1}, 1),
}

_POINTWISE_MODULES = (
    "ReLU ReLU6 LeakyReLU RReLU ELU CELU SELU SiLU GELU Mish Hardswish Hardsigmoid Hardtanh Sigmoid Tanh "
    "Softplus Softsign LogSigmoid Threshold Hardshrink Softshrink "
    "Tanhshrink Identity Dropout Dropout1d Dropout2d Dropout3d AlphaDropout FeatureAlphaDropout"
)

# Keyed by qualified class name, so that libraries need not be imported. A subclass that keeps the forward of its base
# has the rule of its base.
MODULES: dict[str, Rule] = {
    **{_name: elementwise for _m in _POINTWISE_MODULES.split() for _name in (f"{getattr(nn, _m).__module__}.{_m}",)},
    **{f"torch.nn.modules.conv.{_m}{_n}d": convolution for _m in ("Conv", "ConvTranspose") for _n in (1, 2, 3)},
    **{
        f"torch.nn.modules.batchnorm.{_m}": channel_scale(1, ("weight", "bias", "running_mean", "running_var"))
        for _m in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm")
    },
    **{
        f"torch.nn.modules.instancenorm.InstanceNorm{_n}d": channel_scale(
            1, ("weight", "bias", "running_mean", "running_var")
        )
        for _n in (1, 2, 3)
    },
    **{
        f"torch.nn.modules.pooling.{_m}Pool{_n}d": windows(_n)
        for _m in ("Max", "Avg", "AdaptiveAvg", "AdaptiveMax", "LP")
        for _n in (1, 2, 3)
    },
    **{f"torch.nn.modules.pooling.MaxUnpool{_n}d": unpool(_n) for _n in (1, 2, 3)},
    **{
        f"torch.nn.modules.padding.{_m}Pad{_n}d": windows(_n)
        for _m in ("Zero", "Reflection", "Replication", "Constant", "Circular")
        for _n in (1, 2, 3)
    },
    **{
        f"torch.nn.modules.upsampling.{_m}": windows(None)
        for _m in ("Upsample", "UpsamplingBilinear2d", "UpsamplingNearest2d")
    },
    **{f"torch.nn.modules.activation.{_m}": channel_argument for _m in ("Softmax", "Softmax2d", "LogSoftmax")},
    "torch.nn.modules.activation.GLU": gated,
    "torch.nn.modules.linear.Linear": linear,
    "torch.nn.modules.normalization.GroupNorm": group_norm,
    "torch.nn.modules.normalization.LayerNorm": layer_norm,
    "torch.nn.modules.normalization.RMSNorm": layer_norm,
    "torch.nn.modules.activation.PReLU": channel_scale(1, ("weight",)),
    "torch.nn.modules.flatten.Flatten": reshape,
    "torch.nn.modules.flatten.Unflatten": reshape,
    "torch.nn.modules.pixelshuffle.PixelShuffle": reshape,
    "torch.nn.modules.pixelshuffle.PixelUnshuffle": reshape,
    "torch.nn.modules.channelshuffle.ChannelShuffle": reshape,
    "fxprune.graph.layers.ChannelGather": gather,
    "fxprune.graph.norms.GroupNormWithZeros": group_norm_with_zeros,
    "fxprune.graph.norms.LayerNormWithZeros": layer_norm_with_zeros,
    "torchvision.models.convnext.LayerNorm2d": channel_scale(1, ("weight", "bias")),
    "torchvision.models.video.resnet.Conv3DSimple": convolution,
    "torchvision.models.video.resnet.Conv3DNoTemporal": convolution,
    "torchvision.ops.stochastic_depth.StochasticDepth": elementwise,
    "timm.layers.drop.DropPath": elementwise,
    **{
        f"timm.layers.std_conv.{_m}": convolution
        for _m in ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame")
    },
    "timm.layers.conv2d_same.Conv2dSame": convolution,
    "timm.layers.linear.Linear": linear,
    **{
        f"timm.layers.norm_act.{_m}": channel_scale(1, ("weight", "bias", "running_mean", "running_var"))
        for _m in ("BatchNormAct2d", "SyncBatchNormAct")
    },
    "timm.layers.norm_act.GroupNormAct": group_norm,
    "timm.layers.norm_act.GroupNorm1Act": group_norm,
    "timm.layers.norm_act.LayerNormAct": layer_norm,
    **{
        f"timm.layers.norm_act.{_m}": channel_scale(1, ("weight", "bias"))
        for _m in ("LayerNormAct2d", "LayerNormAct2dFp32", "LayerNormActFp32")
    },
    "timm.layers.norm.GroupNorm": group_norm,
    "timm.layers.norm.GroupNorm1": group_norm,
    **{
        f"timm.layers.norm.{_m}": layer_norm
        for _m in ("LayerNorm", "LayerNormFp32", "RmsNorm", "RmsNormFp32", "SimpleNorm")
    },
    **{
        f"timm.layers.norm.{_m}": channel_scale(1, ("weight", "bias"))
        for _m in ("LayerNorm2d", "LayerNorm2dFp32", "RmsNorm2d", "SimpleNorm2d")
    },
    "timm.models.metaformer.LayerNorm2dNoBias": channel_scale(1, ("weight", "bias")),
    "timm.models.metaformer.LayerNormNoBias": layer_norm,
    "timm.models.metaformer.GroupNorm1NoBias": group_norm,
}


def function_rule(function: Any) -> Rule | None:
    """The rule of a function, or None."""
    named = f"{getattr(function, '__module__', '')}.{getattr(function, '__name__', '')}"
    return FUNCTIONS.get(function) or _LIBRARY_FUNCTIONS.get(named)


def rule_for(module: nn.Module) -> Rule | None:
    """The rule of a module: of the nearest class in its line that is in the table, provided the module computes the
    same forward.
    """
    for cls in type(module).__mro__:
        rule = MODULES.get(f"{cls.__module__}.{cls.__qualname__}")
        if rule is not None:
            same = all(
                getattr(type(module), name, None) is getattr(cls, name, None) for name in ("forward", "_conv_forward")
            )
            return rule if same else None
    return None
