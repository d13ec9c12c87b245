"""`fxprune demo`: train a small residual network on scikit-learn's digits, compile it, and compare.

The images (1,797 of 8x8 pixels) come with scikit-learn: nothing is downloaded. All of it takes seconds on two cores.
"""

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

import fxprune
from fxprune.errors import VerificationError
from fxprune.exports import save_torchscript

BATCH = 64
"""Images in a training batch, and in the batch whose latency is measured."""
CALIBRATION = 256
"""Training images that the refitted network is calibrated with."""


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; with `stride` 2, the shortcut is a strided 1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = (
            nn.Identity()
            if stride == 1
            else nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels)
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class DigitNet(nn.Module):
    """A residual network for `(N, 1, 8, 8)` images of digits: a stem and three stages of 16, 32 and 64 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.stage1 = ResidualBlock(16, 16)
        self.stage2 = ResidualBlock(16, 32, stride=2)
        self.stage3 = ResidualBlock(32, 64, stride=2)
        self.classifier = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        features = self.stage3(self.stage2(self.stage1(self.stem(x))))
        logits: Tensor = self.classifier(features.mean((2, 3)))
        return logits


@dataclass(frozen=True)
class DigitData:
    """Images `(N, 1, 8, 8)`, float32 in [0, 1], and labels `(N,)`, int64, of a fixed, stratified split."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Row:
    """One network of the demo: test accuracy in [0, 1], parameters, MACs per image, milliseconds per batch of 64."""

    name: str
    accuracy: float
    params: int
    macs: int
    latency_ms: float


@dataclass(frozen=True)
class DemoResult:
    """What the demo found. `str()` is a table, `to_dict()` fits JSON.

    Attributes:
        rows: the dense, masked, compiled, refitted and fine-tuned network.
        agreement: what compile found of the refitted network, in words, see `fxprune.Report.agreement`.
        difference: largest absolute difference of test logits between the compiled and the masked network (float32).
        agreeing: test images on which these two predict the same class.
        test_images: number of test images.
        torchscript: the saved TorchScript file; `torchscript_difference` is that of its logits to the compiled ones.
        saved: the file of `fxprune.save`; `saved_difference` is that of the network that `fxprune.load` makes of it.
        seconds: wall-clock time of the whole demo.
    """

    rows: tuple[Row, ...]
    agreement: str
    difference: float
    agreeing: int
    test_images: int
    torchscript: Path
    torchscript_difference: float
    saved: Path
    saved_difference: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the result as dicts, lists, numbers and strings."""
        return asdict(self) | {
            "rows": [asdict(row) for row in self.rows],
            "torchscript": str(self.torchscript),
            "saved": str(self.saved),
        }

    def __str__(self) -> str:
        lines = [
            f"{'network':<12}{'accuracy':>10}{'parameters':>13}{'MACs/image':>13}{'ms/batch':>11}",
            *(
                f"{row.name:<12}{row.accuracy:>10.2%}{row.params:>13,}{row.macs:>13,}{row.latency_ms:>11.2f}"
                for row in self.rows
            ),
            "",
            f"compiled vs masked: largest difference of logits {self.difference:.1e}; "
            f"same class on {self.agreeing} of {self.test_images} test images",
            "  Pruning costs accuracy (dense to masked); compiling does not (masked to compiled).",
            f"  refitted has as many MACs and no training either, but read {CALIBRATION} images without labels:",
            f"  {self.agreement}.",
            "  fine-tuned is the compiled network after a few epochs of ordinary training.",
            "  The images are tiny: these times say little about those of larger networks.",
            "saved, loaded again and compared with the compiled network:",
            f"  TorchScript   {self.torchscript} (largest difference {self.torchscript_difference:.1e})",
            f"  fxprune.save  {self.saved} (largest difference {self.saved_difference:.1e})",
            f"ms/batch: median over a batch of {BATCH}, one thread; the whole demo took {self.seconds:.1f} s",
        ]
        return "\n".join(lines)


def run(
    output: str | Path,
    *,
    ratio: float = 0.5,
    epochs: int = 12,
    finetune_epochs: int = 4,
    repeats: int = 30,
    seed: int = 0,
    progress: bool = False,
) -> DemoResult:
    """Train, compile, fine-tune and compare; write `digits.pt` and `digits_torchscript.pt` to the folder `output`.

    Args:
        output: a folder, made if absent.
        ratio: the share of kernel groups to prune, in [0, 1).
        epochs: of training the dense network.
        finetune_epochs: of training the compiled one.
        repeats: interleaved latency measurements, of which the median counts.
        seed: of weights and batches; the same seed gives the same networks on the same machine.
        progress: show bars on stderr.

    Raises:
        VerificationError: a file that was written and read again computes something else than the compiled network.
        FxpruneError: as `fxprune.compile`.
    """
    began = time.perf_counter()
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    data = digits()
    with _one_thread(), torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        dense, untrained = DigitNet(), DigitNet()
        _train(dense, data, epochs, 1e-2, "training", progress)
        example = data.test_images[:2]
        plan = fxprune.make_plan(dense, ratio, example_inputs=example, seed=seed)
        masked = fxprune.mask(dense, plan).eval()
        compiled = fxprune.rewrite(masked, plan, example).eval()
        fxprune.verify(compiled, masked, example)
        refitted = fxprune.compile(dense, ratio, calibration=data.train_images[:CALIBRATION], seed=seed).eval()
        finetuned = copy.deepcopy(compiled)
        _train(finetuned, data, finetune_epochs, 3e-3, "fine-tuning", progress)

    report, refit = fxprune.report(compiled), fxprune.report(refitted)
    dense_cost = (report.params_dense, report.macs_dense or 0)
    compiled_cost = (report.params_pruned, report.macs_pruned or 0)
    networks: dict[str, tuple[nn.Module, tuple[int, int]]] = {
        "dense": (dense, dense_cost),
        "masked": (masked, dense_cost),
        "compiled": (compiled, compiled_cost),
        "refitted": (refitted, (refit.params_pruned, refit.macs_pruned or 0)),
        "fine-tuned": (finetuned, compiled_cost),
    }
    models = {name: model for name, (model, _) in networks.items()}
    with _one_thread():
        latency = _latencies(models, data.test_images[:BATCH], repeats, progress)
    logits = {name: _logits(model, data.test_images) for name, model in models.items()}

    torchscript = output / "digits_torchscript.pt"
    saved = output / "digits.pt"
    scripted = save_torchscript(compiled, torchscript)
    fxprune.save(compiled, saved)
    loaded = fxprune.load(saved, untrained).eval()

    return DemoResult(
        rows=tuple(
            Row(name, _accuracy(logits[name], data.test_labels), *cost, latency[name])
            for name, (_, cost) in networks.items()
        ),
        agreement=str(refit.agreement),
        difference=_difference(logits["compiled"], logits["masked"]),
        agreeing=int((logits["compiled"].argmax(1) == logits["masked"].argmax(1)).sum()),
        test_images=len(data.test_labels),
        torchscript=torchscript,
        torchscript_difference=_same("TorchScript", scripted, data.test_images, logits["compiled"]),
        saved=saved,
        saved_difference=_same("fxprune.load", loaded, data.test_images, logits["compiled"]),
        seconds=time.perf_counter() - began,
    )


def digits() -> DigitData:
    """Load the digits and split them, always in the same way, into 1,347 training and 450 test images."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images, labels, test_size=450, random_state=0, stratify=labels)
    train_images, test_images, train_labels, test_labels = map(torch.tensor, split)
    return DigitData(
        train_images=train_images.float().reshape(-1, 1, 8, 8) / 16,  # 16 grey levels
        train_labels=train_labels,
        test_images=test_images.float().reshape(-1, 1, 8, 8) / 16,
        test_labels=test_labels,
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let torch use one thread: on 8x8 images a second gains nothing, and two that wait for a busy core lose a lot."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _train(model: nn.Module, data: DigitData, epochs: int, peak_rate: float, label: str, progress: bool) -> None:
    """Train with Adam on a one-cycle schedule up to `peak_rate`; leave the model in evaluation mode."""
    batches = -(-len(data.train_labels) // BATCH)
    steps = epochs * batches
    if steps == 0:
        model.eval()
        return
    optimizer = torch.optim.Adam(model.parameters(), lr=peak_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_rate, total_steps=steps)
    model.train()
    with tqdm(total=steps, desc=label, unit="batch", disable=not progress) as bar:
        for _ in range(epochs):
            for chosen in torch.randperm(len(data.train_labels)).chunk(batches):
                loss = F.cross_entropy(model(data.train_images[chosen]), data.train_labels[chosen])
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                optimizer.step()
                schedule.step()
                bar.update()
    model.eval()


@torch.inference_mode()
def _logits(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return model(images)


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).double().mean())


def _difference(left: Tensor, right: Tensor) -> float:
    return float((left - right).abs().max())


@torch.inference_mode()
def _latencies(models: Mapping[str, nn.Module], batch: Tensor, repeats: int, progress: bool) -> dict[str, float]:
    """Median milliseconds per call; the models take turns, so that a change of clock speed meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for model in models.values():
        model(batch)
    for _ in tqdm(range(repeats), desc="timing", disable=not progress):
        for name, model in models.items():
            start = time.perf_counter()
            model(batch)
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def _same(label: str, model: Callable[[Tensor], Tensor], images: Tensor, expected: Tensor) -> float:
    """Return the largest difference; raise if it is more than float32 rounding, 1e-4 of the largest logit."""
    difference = _difference(_logits(model, images), expected)
    bound = 1e-4 * float(expected.abs().max())
    if not difference <= bound:
        raise VerificationError(
            f"{label}: logits differ from those of the compiled network by {difference:.1e}, more than {bound:.1e}"
        )
    return difference
