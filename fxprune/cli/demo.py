"""`fxprune demo`: train a residual network on scikit-learn's digits, make it smaller in four ways, and compare.

The images (1,797 of 8x8 pixels) come with scikit-learn: nothing is downloaded. All of it takes less than a minute on
two cores.
"""

import copy
import importlib.util
import time
import warnings
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
from fxprune.errors import PoorAgreementWarning, VerificationError
from fxprune.exports import save_onnx
from fxprune.inference.race import race
from fxprune.tables import Bar, Cell, Column, Table, Tabular

WIDTH = 64
"""Channels of the first stage: from so many on, half of the work is a good deal less time."""
BATCH = 64
"""Images in a training batch, and in the batch whose latency is measured."""
CALIBRATION = 256
"""Training images that the network is calibrated with, without their labels."""
MIN_SECONDS = 0.02
"""Of a turn of the race."""
ACCELERATED, ONNX = "accelerated", "ONNX Runtime"
NEXT = "fxprune compile resnet18 --pretrained --macs 0.5 --calibration photos/ -o resnet18.pt --onnx resnet18.onnx"
"""What to type next."""


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
    """A residual network for `(N, 1, 8, 8)` images of digits: a stem and three stages of `width`, twice and four times
    as many channels.
    """

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.stage1 = ResidualBlock(width, width)
        self.stage2 = ResidualBlock(width, 2 * width, stride=2)
        self.stage3 = ResidualBlock(2 * width, 4 * width, stride=2)
        self.classifier = nn.Linear(4 * width, 10)

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
    """One network of the demo.

    Attributes:
        name: what was done.
        labels: whether labels were needed for it.
        accuracy: on the test images, in [0, 1].
        params, macs: parameters, and MACs of one image.
        milliseconds: shortest time of a batch of 64 in each runtime, on one thread.
    """

    name: str
    labels: bool
    accuracy: float
    params: int
    macs: int
    milliseconds: Mapping[str, float]


@dataclass(frozen=True, repr=False)
class DemoResult(Tabular):
    """What the demo found. `str()` is a table, `to_dict()` fits JSON.

    Attributes:
        rows: the dense network, and what became of it: pruned alone, calibrated, recovered and fine-tuned.
        agreement: what calibration found on images that it held out, in words, see `fxprune.Report.agreement`.
        difference: largest absolute difference of test logits between the compiled and the masked network (float32).
        agreeing: test images on which these two predict the same class.
        test_images: number of test images.
        written: the files that were written, by kind; the network in them is the recovered one.
        differences: largest difference of the logits that each file gives, to those of the network.
        seconds: wall-clock time of the whole demo.
    """

    rows: tuple[Row, ...]
    agreement: str
    difference: float
    agreeing: int
    test_images: int
    written: Mapping[str, Path]
    differences: Mapping[str, float]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return the result as dicts, lists, numbers and strings."""
        return asdict(self) | {
            "rows": [asdict(row) for row in self.rows],
            "written": {kind: str(path) for kind, path in self.written.items()},
        }

    def brief(self) -> str:
        """The sentence at the end: what is in the file that was written last, how fast, and at what cost."""
        dense = self.rows[0]
        result = next(row for row in reversed(self.rows) if not row.labels)
        runtime = list(dense.milliseconds)[-1]
        faster = dense.milliseconds[runtime] / result.milliseconds[runtime]
        lost = 100 * (dense.accuracy - result.accuracy)
        points = f"{lost:.1f} points lost" if lost >= 0.05 else "no accuracy lost"
        speed = f"{faster:.1f}x faster" if faster >= 1 else f"{1 / faster:.1f}x slower"
        return f"{list(self.written.values())[-1]}: {speed} ({runtime}), {points}, no labels used"

    def table(self) -> Table:
        """One line for each network."""
        runtimes = list(self.rows[0].milliseconds)
        columns = (
            Column("network", right=False),
            *map(Column, ("accuracy", "parameters", "MACs/image")),
            *(Column(f"ms {runtime}") for runtime in runtimes),
            Column("", right=False),
        )
        slowest = {runtime: max(row.milliseconds[runtime] for row in self.rows) for runtime in runtimes}
        rows: tuple[tuple[Cell, ...], ...] = tuple(
            (
                row.name,
                f"{row.accuracy:.2%}",
                f"{row.params:,}",
                f"{row.macs:,}",
                *(
                    Bar(f"{row.milliseconds[runtime]:.2f}", row.milliseconds[runtime] / slowest[runtime])
                    for runtime in runtimes
                ),
                "labels" if row.labels else "",
            )
            for row in self.rows
        )
        after = (
            f"calibrated: {CALIBRATION} images without labels; {self.agreement}.",
            "recovered: the same images, some more seconds, still no labels; fine-tuned: a few epochs with labels.",
            f"exact: the compiled network and the masked one give the same class on {self.agreeing} of "
            f"{self.test_images} test images; logits differ by {self.difference:.1e} at most.",
            f"times: shortest, a batch of {BATCH}, one thread; the small networks are one graph with different "
            f"weights. All of it took {self.seconds:.0f} s.",
            "",
            self.brief(),
            f"next: {NEXT}",
        )
        return Table(columns, rows, after=after)


def run(
    output: str | Path,
    *,
    ratio: float = 0.75,
    epochs: int = 4,
    finetune_epochs: int = 2,
    recover_seconds: float = 10.0,
    rounds: int = 15,
    width: int = WIDTH,
    onnx: bool | None = None,
    seed: int = 0,
    progress: bool = False,
) -> DemoResult:
    """Train, compile, calibrate, recover, fine-tune and compare; write `model.pt`, and `model.onnx` where ONNX is
    installed, to the folder `output`.

    Args:
        output: a folder, made if absent.
        ratio: the share of kernel groups to prune, in [0, 1).
        epochs: of training the dense network.
        finetune_epochs: of training the small one with labels.
        recover_seconds: of training it without.
        rounds: turns of each network in the race for time.
        width: channels of the first stage.
        onnx: whether to write ONNX and time ONNX Runtime; None if they are installed.
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
    images, example = data.train_images[:CALIBRATION], data.test_images[:2]
    with _one_thread(), torch.random.fork_rng(devices=()), warnings.catch_warnings():
        warnings.simplefilter("ignore", PoorAgreementWarning)  # the table says it
        torch.manual_seed(seed)
        dense, untrained = DigitNet(width), DigitNet(width)
        _train(dense, data, epochs, 3e-3, "training", progress)
        plan = fxprune.make_plan(dense, ratio, example_inputs=example, seed=seed)
        masked = fxprune.mask(dense, plan).eval()
        pruned = fxprune.rewrite(masked, plan, example).eval()
        fxprune.verify(pruned, masked, example)
        refitted = fxprune.mask(dense, plan, images)  # the same plan: calibration is all that differs
        calibrated = fxprune.rewrite(refitted, plan, example).eval()
        learnt = fxprune.recover(dense, refitted, plan, images, seconds=recover_seconds, seed=seed, progress=progress)
        recovered = fxprune.rewrite(learnt, plan, example).eval()
        finetuned = copy.deepcopy(recovered)
        _train(finetuned, data, finetune_epochs, 1e-3, "fine-tuning", progress)

        written, differences = _written(recovered, untrained, output, example, data.test_images, onnx)
        times = _times({"dense": dense, "small": calibrated}, data, rounds, onnx, output, progress)
    report = fxprune.report(calibrated)
    costs = {
        "dense": (report.params_dense, report.macs_dense or 0),
        "small": (report.params_pruned, report.macs_pruned or 0),
    }
    networks: tuple[tuple[str, nn.Module, str, bool], ...] = (
        ("dense", dense, "dense", False),
        ("pruned alone", pruned, "small", False),
        ("calibrated", calibrated, "small", False),
        ("recovered", recovered, "small", False),
        ("fine-tuned", finetuned, "small", True),
    )
    found, expected = _logits(pruned, data.test_images), _logits(masked, data.test_images)
    return DemoResult(
        rows=tuple(
            Row(name, labels, _accuracy(_logits(network, data.test_images), data.test_labels), *costs[of], times[of])
            for name, network, of, labels in networks
        ),
        agreement=str(report.agreement),
        difference=_difference(found, expected),
        agreeing=int((found.argmax(1) == expected.argmax(1)).sum()),
        test_images=len(data.test_labels),
        written=written,
        differences=differences,
        seconds=time.perf_counter() - began,
    )


def _written(
    network: nn.Module, untrained: nn.Module, output: Path, example: Tensor, images: Tensor, onnx: bool | None
) -> tuple[dict[str, Path], dict[str, float]]:
    """Write the files, read them again, and see that they compute what the network does."""
    expected = _logits(network, images)
    written = {"fxprune": output / "model.pt"}
    fxprune.save(network, written["fxprune"])
    again = fxprune.load(written["fxprune"], untrained).eval()
    differences = {"fxprune": _same("fxprune.load", again, images, expected)}
    if _has_onnx(onnx):
        written["ONNX"] = output / "model.onnx"
        save_onnx(network, (example,), written["ONNX"])
        differences["ONNX"] = _same("ONNX Runtime", _session(written["ONNX"]), images, expected)
    return written, differences


def _times(
    networks: Mapping[str, nn.Module],
    data: DigitData,
    rounds: int,
    onnx: bool | None,
    output: Path,
    progress: bool,
) -> dict[str, dict[str, float]]:
    """Shortest milliseconds of a batch, of each network in each runtime; all take turns."""
    batch = data.test_images[:BATCH]
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for name, network in networks.items():
        calls[name, "eager"] = _calling(network, batch)
        calls[name, ACCELERATED] = _calling(fxprune.accelerate(network, batch, progress=progress), batch)
        if _has_onnx(onnx):
            file = output / f"{name}.onnx"
            save_onnx(network, (batch[:2],), file)
            calls[name, ONNX] = _calling(_session(file), batch)
            file.unlink()
    label = "timing" if progress else None
    with torch.inference_mode():
        keys = {f"{name} {runtime}": call for (name, runtime), call in calls.items()}
        timings = race(keys, rounds=rounds, min_seconds=MIN_SECONDS, progress=label)
    times: dict[str, dict[str, float]] = {name: {} for name in networks}
    for name, runtime in calls:
        times[name][runtime] = 1e3 * timings[f"{name} {runtime}"].fastest
    return times


def _calling(network: Callable[[Tensor], Tensor], batch: Tensor) -> Callable[[], object]:
    return lambda: network(batch)


def _has_onnx(asked: bool | None) -> bool:
    needed = ("onnx", "onnxscript", "onnxruntime")
    return asked if asked is not None else all(importlib.util.find_spec(name) is not None for name in needed)


def _session(path: Path) -> Callable[[Tensor], Tensor]:
    """What runs an ONNX file in ONNX Runtime, on one thread."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    return lambda images: torch.from_numpy(session.run(None, {given.name: images.numpy()})[0])


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


def _same(label: str, model: Callable[[Tensor], Tensor], images: Tensor, expected: Tensor) -> float:
    """Return the largest difference; raise if it is more than float32 rounding, 1e-4 of the largest logit."""
    difference = _difference(_logits(model, images), expected)
    bound = 1e-4 * float(expected.abs().max())
    if not difference <= bound:
        raise VerificationError(
            f"{label}: logits differ from those of the compiled network by {difference:.1e}, more than {bound:.1e}"
        )
    return difference
