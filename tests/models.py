"""The model zoo: torchvision and timm models that users compile, at the smallest sizes that they accept."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torchvision
from equality import randomize
from torch import Tensor, nn


@dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    Attributes:
        name: what the source calls it.
        source: `torchvision`, `segmentation`, `detection` (only the backbone, the rest cannot be traced) or `timm`.
        size: height and width of the input, as small as the model accepts.
        fast: takes a few seconds and stands for others.
        first: of these, part of every test run.
        huge: too slow or too large for any regular run; a smaller sibling is tested in its place.
        modes: in which modes the compiled model must equal the masked one.
        dense: patterns of module names whose eligible convolutions must stay dense all the same, because they are
            never called or sit inside a module that cannot be traced.
    """

    name: str
    source: str
    size: int = 64
    fast: bool = False
    first: bool = False
    huge: bool = False
    modes: tuple[str, ...] = ("eval", "train")
    dense: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.source}:{self.name}"


# --- torchvision ----------------------------------------------------------------------------------------------------

# All that torchvision lists; what needs more than a small input or a few seconds is named below.
CLASSIFICATION = torchvision.models.list_models(module=torchvision.models)
SEGMENTATION = torchvision.models.list_models(module=torchvision.models.segmentation)
# Mask R-CNN and Keypoint R-CNN have the backbones of Faster R-CNN. SSD with VGG accepts 300 pixels only.
DETECTION = [
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
    "fcos_resnet50_fpn",
    "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large",
]

# --- timm -----------------------------------------------------------------------------------------------------------

# One or two a family. Torch-Pruning 1.6.1 crashes on these, changes their function, or does not finish within 120 s.
SHOWCASE = [
    "cspdarknet53",
    "cspresnet50",
    "convnextv2_atto",
    "ecaresnet26t",
    "edgenext_xx_small",
    "gc_efficientnetv2_rw_t",
    "mixnet_s",
    "nfnet_l0",
    "poolformer_s12",
    "res2net50_14w_8s",
    "rexnet_100",
    "skresnet18",
    "tresnet_m",
]
TIMM = [
    *SHOWCASE,
    "bat_resnext26ts",
    "botnet26t_256",
    "coat_lite_tiny",  # calls one module at several sites
    "convmixer_768_32",
    "convnext_atto",
    "cs3darknet_s",
    "darknet53",
    "densenet121",
    "dla34",
    "dpn48b",
    "efficientnet_b0",
    "efficientnet_b0_gn",
    "efficientnet_lite0",
    "efficientvit_b0",
    "ese_vovnet19b_dw",
    "fasternet_t0",
    "fastvit_t8",
    "fbnetc_100",
    "gcresnet33ts",
    "gernet_s",
    "ghostnet_050",
    "ghostnet_100",
    "hardcorenas_a",
    "hgnetv2_b0",
    "hrnet_w18_small",
    "inception_next_atto",
    "inception_v4",
    "lcnet_050",
    "legacy_seresnet18",
    "legacy_seresnext26_32x4d",
    "levit_128s",  # stores a proxy on itself while it is traced
    "mambaout_femto",
    "mobilenetv3_small_050",
    "mobilenetv4_conv_small",
    "mobileone_s0",
    "mobilevit_xxs",
    "nf_resnet26",
    "pvt_v2_b0",
    "regnety_040_sgn",
    "regnetz_005",
    "regnetz_b16",
    "repghostnet_050",
    "repvgg_a0",
    "repvit_m0_9",
    "resnest14d",
    "resnet26d",
    "resnet51q",
    "resnetblur50",
    "resnetv2_50d_evos",
    "resnetv2_50x1_bit",
    "selecsls42",
    "selecsls42b",
    "semnasnet_050",
    "seresnet18",
    "spnasnet_100",
    "starnet_s1",
    "tf_efficientnet_b0",
    "tf_mobilenetv3_small_minimal_100",
    "tinynet_e",
    "vovnet39a",
    "xception41",
]

# --- what is special about some of them -----------------------------------------------------------------------------

# About fourteen that stand for the rest and take a few seconds each.
FAST = {
    "torchvision:densenet121",
    "torchvision:efficientnet_b0",
    "torchvision:mobilenet_v3_small",
    "torchvision:regnet_y_400mf",
    "torchvision:resnet18",
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:squeezenet1_1",
    "segmentation:lraspp_mobilenet_v3_large",
    "detection:fasterrcnn_mobilenet_v3_large_320_fpn",
    "timm:convnextv2_atto",
    "timm:ecaresnet26t",
    "timm:ghostnet_050",
    "timm:mixnet_s",
    "timm:skresnet18",
}
# The quickest of each way to join branches: addition, gates, concatenation, shuffle, and of what timm adds.
FIRST = {
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:squeezenet1_1",
    "timm:convnextv2_atto",
}
HUGE = {
    f"torchvision:{name}"
    for name in CLASSIFICATION
    if name.startswith(("vgg13", "vgg16", "vgg19", "vit_", "swin_b", "swin_v2_b", "wide_resnet101", "maxvit"))
    or name.endswith(("_8gf", "_16gf", "_32gf", "_128gf", "_32x8d", "_64x4d"))
    or name in {f"efficientnet_{size}" for size in ("b4", "b5", "b6", "b7", "v2_m", "v2_l")}
    or name in {"convnext_base", "convnext_large", "densenet161", "densenet201", "resnet152"}
} | {"detection:ssd300_vgg16", "segmentation:deeplabv3_resnet101", "segmentation:fcn_resnet101"}
SIZES = {
    "torchvision:inception_v3": 96,
    "torchvision:maxvit_t": 224,
    **{f"torchvision:{name}": 224 for name in CLASSIFICATION if name.startswith("vit_")},
    "detection:ssd300_vgg16": 300,
    "timm:bat_resnext26ts": 256,
    "timm:botnet26t_256": 256,
    "timm:coat_lite_tiny": 224,
    "timm:inception_v4": 96,
    "timm:levit_128s": 224,
}
DENSE = {
    # Auxiliary heads, which evaluation never calls.
    "torchvision:googlenet": ("aux1.*", "aux2.*"),
    "torchvision:inception_v3": ("AuxLogits.*",),
    # Attention whose forward depends on the shape of its input: it stays whole, with the convolutions inside.
    "timm:bat_resnext26ts": ("stages.*.attn.ba.*",),
    "timm:efficientvit_b0": ("stages.*.context_module.main.*",),
    "timm:mobilevit_xxs": ("stages.2.1.*", "stages.3.1.*", "stages.4.1.*"),
}
# In training these return their auxiliary heads too; the compiled model follows evaluation.
EVALUATION_ONLY = {"torchvision:googlenet", "torchvision:inception_v3"}


def _entry(source: str, name: str) -> Entry:
    key = f"{source}:{name}"
    return Entry(
        name=name,
        source=source,
        size=SIZES.get(key, 64),
        fast=key in FAST,
        first=key in FIRST,
        huge=key in HUGE,
        modes=("eval",) if key in EVALUATION_ONLY else ("eval", "train"),
        dense=DENSE.get(key, ()),
    )


ENTRIES: tuple[Entry, ...] = (
    *(_entry("torchvision", name) for name in CLASSIFICATION),
    *(_entry("segmentation", name) for name in SEGMENTATION),
    *(_entry("detection", name) for name in DETECTION),
    *(_entry("timm", name) for name in TIMM),
)


def build(entry: Entry, seed: int = 0) -> nn.Module:
    """The model in float64 and evaluation mode; every parameter and BatchNorm statistic is random, none is symmetric.

    Raises:
        ModuleNotFoundError: the source is timm, which is not installed.
    """
    with torch.random.fork_rng(devices=()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torchvision and timm say of their own defaults
        torch.manual_seed(seed)
        return randomize(_BUILDERS[entry.source](entry.name).double(), seed).eval()


def inputs(entry: Entry) -> tuple[Tensor]:
    """A batch of two images, (2, 3, size, size), float64."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(2, 3, entry.size, entry.size, generator=generator, dtype=torch.float64),)


def eligible(model: nn.Module, ratio: float, form: str, dense: tuple[str, ...] = ()) -> set[str]:
    """The convolutions that must be grouped: plain Conv2d with 16 channels or more on both sides that divide.

    The partition form of ratio 1 - 1/n needs both sides divisible by n, the overlap form an even number of filters.
    """
    parts = round(1 / (1 - ratio))
    return {
        name
        for name, module in model.named_modules()
        if type(module) is nn.Conv2d
        and module.groups == 1
        and module.in_channels >= 16
        and module.out_channels >= 16
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in dense)
        and (
            module.out_channels % 2 == 0
            if form == "overlap"
            else module.out_channels % parts == module.in_channels % parts == 0
        )
    }


def _torchvision(name: str) -> nn.Module:
    model: nn.Module = torchvision.models.get_model(name, weights=None)
    return model


def _without_backbone_weights(name: str) -> nn.Module:
    model: nn.Module = torchvision.models.get_model(name, weights=None, weights_backbone=None)
    return model


def _detection_backbone(name: str) -> nn.Module:
    return _without_backbone_weights(name).get_submodule("backbone")


def _timm(name: str) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, pretrained=False)
    return model


_BUILDERS: dict[str, Callable[[str], nn.Module]] = {
    "torchvision": _torchvision,
    "segmentation": _without_backbone_weights,
    "detection": _detection_backbone,
    "timm": _timm,
}
