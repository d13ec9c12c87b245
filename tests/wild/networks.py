"""Networks of other libraries, as their libraries build them, with random weights: what users bring.

The libraries are imported where a network is built, so that collecting the tests needs none of them.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from equality import randomize
from torch import Tensor, nn

Example = Callable[[int, int], Any]
"""Example inputs for a batch and a size: a tensor, a tuple of positional arguments, or a dict of arguments by name."""

CONSTANTS = ("dfl.conv.weight",)
"""How the names of parameters end that are constants: the bins of YOLO's distribution of distances."""


@dataclass(frozen=True)
class Wild:
    """One network.

    Attributes:
        name: of the network.
        library: where it comes from, as it is imported.
        make: builds it; its weights are drawn anew afterwards.
        example: its inputs for a batch and a size.
        first: batch and size of the example that is compiled.
        other: another batch and size, at which the result must still be the same function.
        kernels_left: share of the MACs of convolutions that may be left at ratio 0.5 of kernels; where every plain
            convolution with 16 channels or more on both sides is halved, it is a little less.
        filters_left: the same for filters, where half of the channels give a quarter of the MACs; 1 where none can go.
        note: why, where one of them is above 0.6.
        drawn: whether the weights are drawn anew; False keeps those that `make` trained.
    """

    name: str
    library: str
    make: Callable[[], nn.Module]
    example: Example
    first: tuple[int, int] = (2, 64)
    other: tuple[int, int] = (3, 96)
    kernels_left: float = 0.55
    filters_left: float = 0.45
    note: str = ""
    drawn: bool = True

    def __str__(self) -> str:
        return self.name

    def build(self) -> nn.Module:
        """The network in evaluation mode, the same weights in every call."""
        pytest.importorskip(self.library)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            model = self.make()
        if self.drawn:
            fixed = [(p, p.detach().clone()) for name, p in model.named_parameters() if name.endswith(CONSTANTS)]
            randomize(model)
            for parameter, value in fixed:
                parameter.data.copy_(value)
            self._take_statistics(model.eval())
        return model.eval()

    @torch.no_grad()
    def _take_statistics(self, model: nn.Module) -> None:
        """Give BatchNorm the statistics of a batch, and a little noise. With statistics drawn from nothing a deep
        network soon forgets its input, and a comparison of two such networks says nothing.
        """
        layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        momenta = [layer.momentum for layer in layers]
        for layer in layers:
            layer.momentum = 1.0
            layer.train()
        run(model, self.inputs(4, self.first[1]))
        generator = torch.Generator().manual_seed(1)
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
            mean, var = layer.running_mean, layer.running_var
            if mean is not None and var is not None:
                var.mul_(torch.rand(var.shape, generator=generator) + 0.5)
                mean.add_(var.sqrt() * (torch.rand(mean.shape, generator=generator) - 0.5))

    def inputs(self, batch: int, size: int) -> Any:
        """Example inputs, the same in every call."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(batch * size)
            return self.example(batch, size)


def run(model: nn.Module, inputs: Any) -> Any:
    """One run on inputs as `Wild.example` gives them."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


# --- inputs ---------------------------------------------------------------------------------------------------------


def images(channels: int = 3) -> Example:
    return lambda batch, size: torch.randn(batch, channels, size, size)


def volumes(batch: int, size: int) -> Tensor:
    return torch.randn(batch, 1, size, size, size)


def waves(channels: int) -> Example:
    return lambda batch, size: torch.randn(batch, channels, size)


def pixel_values(batch: int, size: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(batch, 3, size, size)}


def list_of_images(batch: int, size: int) -> tuple[list[Tensor]]:
    """What the detectors of torchvision take: images of different sizes, in a list, as the only argument."""
    return ([torch.rand(3, size + 16 * (i % 2), size) for i in range(batch)],)


def noisy_latents(batch: int, size: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, 3, size, size), torch.arange(batch) * 100 + 7


def conditioned_latents(batch: int, size: int) -> dict[str, Tensor]:
    return {
        "sample": torch.randn(batch, 4, size, size),
        "timestep": torch.arange(batch) * 100 + 7,
        "encoder_hidden_states": torch.randn(batch, 5, 32),
    }


# --- builders -------------------------------------------------------------------------------------------------------


def _get(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def yolo(kind: str, config: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model: nn.Module = _get(f"ultralytics.nn.tasks.{kind}Model")(config, nc=7, verbose=False)
        model.args = _get("ultralytics.cfg.get_cfg")()  # its loss reads the weights of its terms there
        return model

    return make


def smp(name: str, encoder: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model: nn.Module = _get(f"segmentation_models_pytorch.{name}")(encoder, encoder_weights=None, classes=5)
        return model

    return make


def hugging_face(name: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model: nn.Module = _get(f"transformers.{name}")(_get(f"transformers.{config}")(**options))
        return model

    return make


def upernet() -> nn.Module:
    backbone = _get("transformers.ConvNextConfig")(
        hidden_sizes=[32, 64, 128, 256], depths=[1, 1, 2, 1], out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    return hugging_face(
        "UperNetForSemanticSegmentation",
        "UperNetConfig",
        backbone_config=backbone,
        hidden_size=64,
        auxiliary_in_channels=128,
        auxiliary_channels=64,
        num_labels=5,
    )()


def detr() -> nn.Module:
    backbone = _get("transformers.ResNetConfig")(depths=[1, 1, 1, 1], out_features=["stage4"])
    return hugging_face(
        "DetrForObjectDetection",
        "DetrConfig",
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        num_queries=10,
        num_labels=5,
    )()


def diffusers(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model: nn.Module = _get(f"diffusers.{name}")(**options)
        return model

    return make


def monai(name: str, dims: int, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model: nn.Module = _get(f"monai.networks.nets.{name}")(dims, in_channels=1, out_channels=2, **options)
        return model

    return make


def monai_unet(dims: int) -> Callable[[], nn.Module]:
    return monai("UNet", dims, channels=(16, 32, 64, 128), strides=(2, 2, 2), num_res_units=2, norm="batch")


def monai_basic(dims: int) -> Callable[[], nn.Module]:
    return monai("BasicUNet", dims, features=(16, 16, 32, 64, 128, 16), norm="batch")


def monai_dyn(dims: int) -> Callable[[], nn.Module]:
    return monai(
        "DynUNet",
        dims,
        kernel_size=[3, 3, 3, 3],
        strides=[1, 2, 2, 2],
        upsample_kernel_size=[2, 2, 2],
        filters=[16, 32, 64, 128],
        deep_supervision=False,
        res_block=True,
    )


def by_hand(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model: nn.Module = _get(f"kinds.{name}")()
        return model

    return make


def facenet() -> nn.Module:
    model: nn.Module = _get("facenet_pytorch.InceptionResnetV1")(pretrained=None, classify=False)
    return model


def detector(name: str, size: int = 64, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        sizes = {"min_size": size, "max_size": 2 * size} if size else {}
        model: nn.Module = _get(f"torchvision.models.detection.{name}")(
            weights=None, weights_backbone=None, num_classes=5, **sizes, **options
        )
        return model

    return make


def segmenter(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        model: nn.Module = _get(f"torchvision.models.segmentation.{name}")(
            weights=None, weights_backbone=None, num_classes=5, aux_loss=None if name.startswith("lraspp") else True
        )
        return model

    return make


def onnx_import() -> nn.Module:
    """A small residual network, trained on digits for a moment, sent through a file of ONNX and read by onnx2torch."""
    net = _Digits()
    x, y = (torch.from_numpy(a) for a in _get("sklearn.datasets.load_digits")(return_X_y=True))
    x, y = x.float().view(-1, 1, 8, 8) / 16, y.long()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for step in range(40):
        rows = slice(step % 10 * 128, step % 10 * 128 + 128)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]  # torch's
        optimizer.step()
    dynamic = {"x": {0: "batch"}}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "digits.onnx"
        torch.onnx.export(
            net.eval(), (x[:2],), file, input_names=["x"], dynamic_axes=dynamic, dynamo=False, opset_version=13
        )
        model: nn.Module = _get("onnx2torch.convert")(file)
    return model


class _Digits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32)
        self.first, self.second = nn.Conv2d(32, 64, 3, padding=1), nn.Conv2d(64, 32, 3, padding=1)
        self.last, self.head = nn.Conv2d(32, 64, 3, 2, 1), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = (x + self.second(self.first(x).relu())).relu()
        y: Tensor = self.head(self.last(x).relu().mean((2, 3)))
        return y


def lightning_module() -> nn.Module:
    """A LightningModule as its documentation writes them, around a network of torchvision."""
    base: Any = _get("pytorch_lightning.LightningModule")
    resnet: Any = _get("torchvision.models.resnet18")

    class Classifier(base):  # type: ignore[misc]  # its base is not known without the library
        def __init__(self, classes: int = 5, lr: float = 1e-3) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.backbone = resnet(weights=None, num_classes=classes)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.backbone(x)
            return y

        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
            x, y = batch
            loss = nn.functional.cross_entropy(self(x), y)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)

    return Classifier()


# --- the networks ---------------------------------------------------------------------------------------------------

_MASK_RCNN_CONFIG: dict[str, Any] = {"box_score_thresh": 0.05, "box_detections_per_img": 10}

NETWORKS: tuple[Wild, ...] = (
    Wild("yolov5n", "ultralytics", yolo("Detection", "yolov5n.yaml"), images()),
    Wild("yolov8n", "ultralytics", yolo("Detection", "yolov8n.yaml"), images()),
    Wild("yolo11n", "ultralytics", yolo("Detection", "yolo11n.yaml"), images()),
    Wild("yolov8n-seg", "ultralytics", yolo("Segmentation", "yolov8n-seg.yaml"), images()),
    Wild("smp-unet", "segmentation_models_pytorch", smp("Unet", "resnet18"), images()),
    Wild("smp-unetplusplus", "segmentation_models_pytorch", smp("UnetPlusPlus", "resnet18"), images()),
    Wild("smp-fpn", "segmentation_models_pytorch", smp("FPN", "efficientnet-b0"), images(), filters_left=0.55),
    Wild("smp-deeplabv3plus", "segmentation_models_pytorch", smp("DeepLabV3Plus", "mobilenet_v2"), images()),
    Wild("smp-pspnet", "segmentation_models_pytorch", smp("PSPNet", "resnet18"), images(), kernels_left=0.6),
    Wild("smp-manet", "segmentation_models_pytorch", smp("MAnet", "resnet18"), images()),
    Wild("smp-linknet", "segmentation_models_pytorch", smp("Linknet", "resnet18"), images(), kernels_left=0.6),
    Wild("smp-pan", "segmentation_models_pytorch", smp("PAN", "resnet18"), images(), (2, 128), (3, 160)),
    Wild("smp-deeplabv3", "segmentation_models_pytorch", smp("DeepLabV3", "resnet18"), images()),
    Wild(
        "hf-resnet",
        "transformers",
        hugging_face(
            "ResNetForImageClassification",
            "ResNetConfig",
            layer_type="basic",
            hidden_sizes=[64, 128, 256, 512],
            depths=[2, 2, 2, 2],
        ),
        pixel_values,
    ),
    Wild(
        "hf-convnext",
        "transformers",
        hugging_face(
            "ConvNextForImageClassification",
            "ConvNextConfig",
            hidden_sizes=[48, 96, 192, 384],
            depths=[1, 1, 3, 1],
        ),
        images(),
        kernels_left=0.7,
        filters_left=1.0,
        note="most convolutions are depthwise, the stem has 3 channels; every channel is normalised with all others",
    ),
    Wild(
        "hf-regnet",
        "transformers",
        hugging_face(
            "RegNetForImageClassification",
            "RegNetConfig",
            hidden_sizes=[32, 64, 160, 384],
            depths=[1, 2, 3, 1],
            groups_width=16,
            layer_type="y",
        ),
        images(),
        kernels_left=0.7,
        filters_left=0.75,
        note="every second convolution is grouped already, and its groups stay whole",
    ),
    Wild(
        "hf-mobilenetv2",
        "transformers",
        hugging_face("MobileNetV2ForImageClassification", "MobileNetV2Config"),
        pixel_values,
        kernels_left=0.6,
    ),
    Wild(
        "hf-efficientnet",
        "transformers",
        hugging_face(
            "EfficientNetForImageClassification",
            "EfficientNetConfig",
            width_coefficient=1.0,
            depth_coefficient=1.0,
            hidden_dim=1280,
            image_size=64,
        ),
        images(),
        kernels_left=0.6,
    ),
    Wild(
        "hf-resnetbackbone",
        "transformers",
        hugging_face(
            "ResNetBackbone", "ResNetConfig", depths=[2, 2, 2, 2], out_features=["stage2", "stage3", "stage4"]
        ),
        images(),
    ),
    Wild("hf-upernet", "transformers", upernet, pixel_values),
    Wild("hf-detr", "transformers", detr, pixel_values, filters_left=0.55),
    Wild(
        "hf-segformer",
        "transformers",
        hugging_face("SegformerForSemanticSegmentation", "SegformerConfig", depths=[1, 1, 1, 1], num_labels=5),
        pixel_values,
        filters_left=1.0,
        note="LayerNorm normalises the channels of every stage together",
    ),
    Wild(
        "diffusers-autoencoderkl",
        "diffusers",
        diffusers(
            "AutoencoderKL",
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(32, 64, 64),
            layers_per_block=1,
            norm_num_groups=16,
        ),
        images(),
        (2, 32),
        (3, 48),
        filters_left=1.0,
        note="GroupNorm normalises channels together that would not go together",
    ),
    Wild("diffusers-autoencodertiny", "diffusers", diffusers("AutoencoderTiny"), images(), (2, 32), (3, 48)),
    Wild(
        "diffusers-unet2d",
        "diffusers",
        diffusers(
            "UNet2DModel",
            block_out_channels=(32, 64, 64),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            norm_num_groups=16,
            attention_head_dim=8,
        ),
        noisy_latents,
        (2, 32),
        (3, 48),
        filters_left=1.0,
        note="GroupNorm normalises channels together that would not go together",
    ),
    Wild(
        "diffusers-unet2dcondition",
        "diffusers",
        diffusers(
            "UNet2DConditionModel",
            block_out_channels=(32, 64, 64),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            norm_num_groups=16,
            cross_attention_dim=32,
            attention_head_dim=8,
        ),
        conditioned_latents,
        (2, 16),
        (3, 24),
        filters_left=1.0,
        note="GroupNorm normalises channels together that would not go together",
    ),
    Wild("monai-unet-2d", "monai", monai_unet(2), images(1), (2, 32), (3, 48), kernels_left=0.6),
    Wild("monai-unet-3d", "monai", monai_unet(3), volumes, (2, 16), (3, 24)),
    Wild("monai-basicunet-2d", "monai", monai_basic(2), images(1), (2, 32), (3, 48)),
    Wild("monai-basicunet-3d", "monai", monai_basic(3), volumes, (2, 16), (3, 32)),
    Wild("monai-dynunet-2d", "monai", monai_dyn(2), images(1), (2, 32), (3, 48)),
    Wild("monai-dynunet-3d", "monai", monai_dyn(3), volumes, (2, 16), (3, 24)),
    Wild("hifigan", "torch", by_hand("HiFiGAN"), waves(80), (2, 16), (3, 25), kernels_left=0.6),
    Wild(
        "hifigan-discriminator",
        "torch",
        by_hand("PeriodDiscriminator"),
        waves(1),
        (2, 1000),
        (3, 1504),
        filters_left=1.0,
        note="what every layer gives is an output",
    ),
    Wild("wav2letter", "torch", by_hand("Wav2Letter"), waves(80), (2, 64), (3, 101)),
    Wild("onnx2torch-digits", "onnx2torch", onnx_import, images(1), (4, 8), (7, 8), drawn=False),
    Wild("facenet", "facenet_pytorch", facenet, images(), (2, 96), (3, 128)),
    Wild(
        "maskrcnn",
        "torchvision",
        detector("maskrcnn_resnet50_fpn", **_MASK_RCNN_CONFIG),
        list_of_images,
        (2, 64),
        (1, 96),
    ),
    Wild("retinanet", "torchvision", detector("retinanet_resnet50_fpn"), list_of_images, (2, 64), (1, 96)),
    Wild("fcos", "torchvision", detector("fcos_resnet50_fpn"), list_of_images, (2, 64), (1, 96), filters_left=0.6),
    Wild(
        "ssdlite",
        "torchvision",
        detector("ssdlite320_mobilenet_v3_large", size=0),
        list_of_images,
        (2, 320),
        (3, 256),
        kernels_left=0.6,
    ),
    Wild("tv-deeplabv3", "torchvision", segmenter("deeplabv3_mobilenet_v3_large"), images()),
    Wild("tv-lraspp", "torchvision", segmenter("lraspp_mobilenet_v3_large"), images()),
    Wild("lightning", "pytorch_lightning", lightning_module, images()),
)
