"""The steps of `benchmarks.cuda`: what is measured of a device.

Each runs in a process of its own, for a device that one of them has brought to an error answers no other, and gives
what it has found so far again and again, the last time when it is done.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from fxprune.comparison.extras import is_installed
from fxprune.comparison.latency import measure, tuned_cudnn
from fxprune.comparison.rivals import Network, dense_network, fxprune_network, settle, torch_pruning_network
from fxprune.graph.fused import FusedConv2d
from fxprune.inference.forms import all_forms, form_calls
from fxprune.inference.stopwatch import Stopwatch
from fxprune.models import load_model
from fxprune.vocabulary import Target

ROOT = Path(__file__).parents[1]

ROUNDS = 11
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "kernels overlap": {"form": "overlap"},
    "kernels overlap, blocks of 64": {"form": "overlap", "block": 64},
    "kernels partition": {"form": "partition"},
    "filters": {"granularity": "filter", "round_to": 8},
}
RATIOS: Mapping[float, Sequence[str]] = {
    0.5: ("kernels overlap", "kernels overlap, blocks of 64", "kernels partition", "filters"),
    0.75: ("kernels overlap", "filters"),
}

LAYERS = ((128, 28), (256, 14), (512, 7))
"""Channels and pixels of 3x3 layers, as ResNets have them."""
LAYER_PLANS = (
    *((2, 0.5, block) for block in (8, 16, 32, 64)), (4, 0.5, 8), (4, 0.5, 16), (4, 0.5, 32), (4, 0.25, 32)
)  # fmt: skip
"""Groups, share of the channels that each reads, and length of the runs it reads them in."""
TARGET = 0.6
"""Share of the dense time to plan for."""
TRAINING_IMAGES = 4096
EPOCHS = 3


@dataclass(frozen=True)
class Place:
    """Where a step is taken, and on what.

    Attributes:
        device: `"cuda"` or `"cpu"`.
        dry: tiny sizes: only whether it runs.
        model: a name for `load_model`.
        batch: images at a time.
        variants: some of `VARIANTS`.
    """

    device: Target
    dry: bool
    model: str
    batch: int
    variants: Sequence[str]

    @property
    def dtype(self) -> torch.dtype:
        """float16, but for a dry run on the CPU."""
        return torch.float16 if self.device == "cuda" else torch.float32

    @property
    def pixels(self) -> int:
        """Height and width of the images."""
        return 64 if self.dry else 224

    @property
    def images(self) -> Tensor:
        """Normal numbers in the place, type and layout to measure in."""
        x = torch.randn(self.batch, 3, self.pixels, self.pixels, generator=torch.Generator().manual_seed(0))
        return x.to(self.device, self.dtype).contiguous(memory_format=torch.channels_last)


Findings = Iterator[Any]
"""What is known so far: each replaces the one before."""


def tests(place: Place) -> Findings:
    """Run `pytest -m cuda`."""
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", "-p", "no:cacheprovider"]
    marked = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.cuda" in path.read_text()]
    command += marked[:1] if place.dry else marked
    if is_installed("xdist") and not place.dry:
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    found = {
        "exit code": done.returncode,
        "summary": lines[-1] if lines else "",
        "failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
    }
    yield found | ({} if done.returncode == 0 else {"error": "not all passed"})


def networks(place: Place) -> Findings:
    """Race whole networks, dense and pruned, as CUDA graphs and eagerly, ratio by ratio."""
    runtimes = ["eager", "cudagraph", "accelerate+cudagraph"] if place.device == "cuda" else ["eager", "accelerate"]
    model, inputs = _settled(place)
    dense = dense_network(model, inputs)
    races: list[dict[str, Any]] = []
    for ratio in RATIOS:
        races.append(_race(place, [dense, *_rivals(place, model, inputs, ratio)], runtimes))
        yield races


def compilers(place: Place) -> Findings:
    """Race the dense network in all that `torch.compile` has."""
    runtimes = ["cudagraph", "max-autotune+cudagraph"] if place.device == "cuda" else ["eager", "compile"]
    yield [_race(place, [dense_network(*_settled(place))], runtimes)]


def layers(place: Place) -> Findings:
    """Time 3x3 layers in every form that there is."""
    stopwatch = Stopwatch(torch.device(place.device), remember=False)
    rows = []
    for channels, pixels in ((32, 8),) if place.dry else LAYERS:
        for groups, share, block in LAYER_PLANS[:1] if place.dry else LAYER_PLANS:
            conv = grouped_layer(channels, groups, share, block).to(place.device, place.dtype)
            shape = torch.Size([place.batch, channels, pixels, pixels])
            forms = {str(form): form for form in all_forms() if not form.engine.obstacle(conv, torch.channels_last)}
            with tuned_cudnn(), torch.inference_mode():
                seconds = stopwatch.race(form_calls(forms, conv, [shape], torch.channels_last))
            rows.append({
                "channels": channels, "pixels": pixels, "batch": place.batch, "groups": groups, "macs_share": share,
                "block": block, "seconds": seconds,
            })  # fmt: skip
            yield rows


def target(place: Place) -> Findings:
    """Plan for a share of the dense time, and see what time comes out."""
    model = load_model(place.model).to(place.device, place.dtype).eval()
    x = place.images
    settle(model, x)
    started = time.monotonic()
    pruned = fxprune.compile(model, latency=TARGET, target=place.device, example_inputs=x, verify=False)
    fast = fxprune.acceleration_report(pruned)
    compiled = fast.compiled
    yield {
        "model": place.model,
        "batch": place.batch,
        "asked": TARGET,
        "reached": fast.relative,
        "macs_share": compiled.macs_pruned / compiled.macs_dense
        if compiled and compiled.macs_pruned and compiled.macs_dense
        else None,
        "planning_seconds": time.monotonic() - started,
        "chosen": fast.chosen,
    }


def training(place: Place) -> Findings:
    """Fine-tune a pruned ResNet-20 for three epochs on images made here, and see that what is pruned stays zero."""
    count, batch = (64, 32) if place.dry else (TRAINING_IMAGES, 128)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (count,), generator=generator)
    patterns = torch.randn(10, 3, 32, 32, generator=generator)
    images = (patterns[labels] + 2 * torch.randn(count, 3, 32, 32, generator=generator)).to(place.device)
    labels = labels.to(place.device)
    model = load_model("resnet20").to(place.device)
    plan = fxprune.make_plan(model, 0.5, example_inputs=images[:2])
    masked = fxprune.mask(model, plan).train()
    optimizer = torch.optim.SGD(masked.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    sparsifier = fxprune.hold(masked, plan, optimizer)
    epochs = []
    for _ in range(1 if place.dry else EPOCHS):
        started, total = time.monotonic(), 0.0
        for picked in torch.randperm(count, generator=generator).to(place.device).reshape(-1, batch):
            with torch.autocast(place.device, torch.bfloat16):
                loss = F.cross_entropy(masked(images[picked]), labels[picked])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.item() * len(picked)
        epochs.append({"loss": total / count, "seconds": time.monotonic() - started})
        yield {"images": count, "epochs": epochs}
    kept = [bool((masked.get_parameter(f"{name}.weight") == 0).any()) for name in plan.layers]
    masked.eval()
    small = sparsifier.rewrite(images[:2])
    found = fxprune.verify(small, masked, images[:2]).max_rel
    yield {"images": count, "epochs": epochs, "pruned": all(kept), "difference": found}


STEPS: Mapping[str, Callable[[Place], Findings]] = {
    "tests": tests, "networks": networks, "compilers": compilers, "layers": layers, "target": target,
    "training": training,
}  # fmt: skip


# --- what is raced ----------------------------------------------------------------------------------------------------


def _race(place: Place, contestants: Sequence[Network], runtimes: Sequence[str]) -> dict[str, Any]:
    with tuned_cudnn():
        rows = measure(contestants, runtimes, ["channels_last"], place.images, 1 if place.dry else ROUNDS)
    return {"model": place.model, "batch": place.batch, "rows": [asdict(row) for row in rows]}


def _settled(place: Place) -> tuple[nn.Module, Tensor]:
    model = load_model(place.model).eval()
    inputs = torch.randn(2, 3, place.pixels, place.pixels, generator=torch.Generator().manual_seed(0))
    settle(model, inputs)
    return model, inputs


def _rivals(place: Place, model: nn.Module, inputs: Tensor, ratio: float) -> Iterator[Network]:
    """Kernels in both forms, and whole filters at equal MACs."""
    for variant in RATIOS[ratio]:
        if variant in place.variants:
            plan = {"target": "cuda", **VARIANTS[variant]}
            if variant == "filters":  # a ratio of filters takes more than that of the MACs
                plan["macs"] = 1 - ratio
            network = fxprune_network(model, inputs, None if "macs" in plan else ratio, plan)
            yield replace(network, name=variant, ratio=ratio)
    if is_installed("torch_pruning") and not place.dry:
        assert network.macs is not None
        yield torch_pruning_network(model, inputs, ratio, network.macs)


def grouped_layer(channels: int, groups: int, share: float, block: int) -> FusedConv2d:
    """A pruned 3x3 convolution with ReLU, whose groups read runs of `block` channels drawn at random."""
    generator = torch.Generator().manual_seed(0)
    kept = int(share * channels)
    block = min(block, kept)
    fused = FusedConv2d(nn.Conv2d(groups * kept, channels, 3, padding=1, groups=groups), channels)
    runs = [
        torch.randperm(channels // block, generator=generator)[: kept // block].sort().values for _ in range(groups)
    ]
    fused.index = (torch.cat(runs)[:, None] * block + torch.arange(block)).flatten()
    fused.minimum, fused.dense_groups = 0.0, 1
    return fused
