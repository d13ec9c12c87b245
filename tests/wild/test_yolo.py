"""YOLOv8n, compiled into the vendor's class: what its users do with it goes on working, with the vendor's own code."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import NETWORKS, Wild
from torch import Tensor, nn
from wild_harness import Compiled, assert_same, compiled_network, in_float64

import fxprune

pytestmark = [
    pytest.mark.wild,
    pytest.mark.usefixtures("strangers"),
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.filterwarnings("error::fxprune.NothingRewrittenWarning"),
]

YOLO: Wild = next(network for network in NETWORKS if network.name == "yolov8n")
_DONE: dict[str, Compiled] = {}


@pytest.fixture(params=["kernel", "filter"])
def yolo(request: pytest.FixtureRequest, strangers: None) -> Compiled:
    """The network, compiled once; each test has copies of its own."""
    if request.param not in _DONE:
        _DONE[request.param] = compiled_network(YOLO, request.param)
    done = _DONE[request.param]
    return Compiled(*(copy.deepcopy(model) for model in (done.dense, done.masked, done.pruned)))


def labelled() -> dict[str, Tensor]:
    """Two images with three boxes, as the vendor's loss wants them."""
    return {
        "img": YOLO.inputs(2, 64),
        "batch_idx": torch.tensor([0.0, 0.0, 1.0]),
        "cls": torch.tensor([[1.0], [4.0], [0.0]]),
        "bboxes": torch.tensor([[0.3, 0.4, 0.3, 0.5], [0.7, 0.6, 0.4, 0.4], [0.5, 0.5, 0.8, 0.6]]),
    }


def loss_of(model: Any) -> Tensor:
    loss, _ = model.loss(labelled())
    total: Tensor = loss.sum()
    return total


def have_gradients(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_a_training_step_with_its_own_loss(yolo: Compiled) -> None:
    with torch.no_grad():
        masked = float(loss_of(copy.deepcopy(yolo.masked).train()))
    pruned = yolo.pruned.train()
    assert all(module.training for module in pruned.modules())
    before = copy.deepcopy(pruned.state_dict())
    loss = loss_of(pruned)
    assert float(loss.detach()) == pytest.approx(masked, rel=1e-3)
    loss.backward()  # type: ignore[no-untyped-call]  # torch's
    dense = yolo.dense.train()
    loss_of(dense).backward()  # type: ignore[no-untyped-call]  # torch's
    assert have_gradients(pruned) == have_gradients(dense)
    reached = {name for name, p in pruned.named_parameters() if p.grad is not None and p.grad.any()}
    assert len(reached) > 0.9 * len(have_gradients(dense))  # one scale has no box to learn from
    torch.optim.Adam(pruned.parameters(), 1e-2).step()
    after = pruned.state_dict()
    assert reached <= {name for name, value in after.items() if not torch.equal(value, before[name])}
    pruned.eval()
    assert not any(module.training for module in pruned.modules())
    # Still the function of a smaller dense model: at once differentiable, finite and of the same shapes.
    output, _ = pruned(YOLO.inputs(1, 96))
    assert output.isfinite().all()
    assert output.shape == yolo.dense.eval()(YOLO.inputs(1, 96))[0].shape


def test_saved_and_loaded_into_a_fresh_model(yolo: Compiled, tmp_path: Path) -> None:
    file = tmp_path / "pruned.pt"
    fxprune.save(yolo.pruned, file)
    fresh = YOLO.build()
    nn.init.zeros_(fresh.get_parameter("model.0.conv.weight"))
    loaded = fxprune.load(file, fresh)
    assert type(loaded) is type(yolo.dense)
    x = YOLO.inputs(*YOLO.other)
    assert_same(in_float64(loaded, x), in_float64(yolo.pruned, x))
    assert list(loaded.state_dict()) == list(yolo.pruned.state_dict())


def test_its_state_dict_goes_into_a_copy(yolo: Compiled) -> None:
    other = copy.deepcopy(yolo.pruned)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    other.load_state_dict(yolo.pruned.state_dict())
    x = YOLO.inputs(*YOLO.other)
    assert_same(in_float64(other, x), in_float64(yolo.pruned, x))


def test_its_own_fusion_of_batch_norm_is_exact(yolo: Compiled) -> None:
    model: Any = copy.deepcopy(yolo.pruned).double()
    fused = model.fuse(verbose=False)
    assert fused.is_fused()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    x = YOLO.inputs(*YOLO.other)
    assert_same(in_float64(fused, x), in_float64(yolo.masked, x))


def test_onnx_gives_the_same_detections(yolo: Compiled, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    nms = pytest.importorskip("ultralytics.utils.nms").non_max_suppression
    x = YOLO.inputs(2, 64)
    with torch.no_grad():
        expected, _ = yolo.pruned(x)
        reference, _ = yolo.masked(x)
    head: Any = yolo.pruned.get_submodule("model.22")
    head.export, head.format = True, "onnx"  # as the vendor's exporter sets them
    file = tmp_path / "yolo.onnx"
    torch.onnx.export(yolo.pruned, (x,), file, input_names=["images"], output_names=["output0"], dynamo=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (found,) = (torch.from_numpy(y) for y in session.run(None, {"images": x.numpy()}))
    for wanted in (expected, reference):
        assert found.shape == wanted.shape
        assert float((found - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())
    detections = [nms(y, conf_thres=0.5, iou_thres=0.6, max_time_img=60.0) for y in (found, expected, reference)]
    assert sum(map(len, detections[0])) > 2
    for others in detections[1:]:
        for ours, theirs in zip(detections[0], others, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-2)
