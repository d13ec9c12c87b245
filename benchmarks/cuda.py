"""Everything about a CUDA device in one command, in the order of its worth. Each step writes what it found at once, so
that a kill loses nothing.

    python -m benchmarks.cuda --minutes 9 --output DIR
    python -m benchmarks.cuda --device cpu --dry --output DIR   # the same code on tiny sizes, without a device
    python -m benchmarks.cuda --page RECORD.json                # the tables of a record, as Markdown

It needs no network and nothing beyond what fxprune needs; Torch-Pruning takes part where it is installed. The record is
DIR/cuda-DEVICE.json.
"""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune
from benchmarks._cuda_page import page
from fxprune.comparison.extras import is_installed
from fxprune.comparison.latency import measure, tuned_cudnn
from fxprune.comparison.rivals import Network, dense_network, fxprune_network, settle, torch_pruning_network
from fxprune.environment import environment
from fxprune.files import write_json
from fxprune.graph.fused import FusedConv2d
from fxprune.inference.forms import all_forms, form_calls
from fxprune.inference.stopwatch import Stopwatch
from fxprune.models import load_model

ROOT = Path(__file__).parents[1]
TEST_SECONDS = 120
COMPILE_SECONDS = 60
"""`torch.compile(mode="max-autotune")` of one network may take so long."""
RESERVE_SECONDS = 20
"""A step is not begun with less time than this."""

MODELS = ("resnet18", "resnet50")
BATCHES = (32, 1)
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

LAYER_BATCH = 32
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


@dataclass
class Session:
    """What is measured, where, and how much time is left for it.

    Attributes:
        device: `"cuda"` or `"cpu"`.
        dry: tiny sizes: only whether it runs.
        end: when to stop, on the monotonic clock.
        models: names of the networks.
        batches: images at a time.
        variants: some of `VARIANTS`.
        compile_seconds: how long `torch.compile(mode="max-autotune")` may take; 0 leaves it out.
        path: of the record, written after each step.
        record: what was found.
    """

    device: str
    dry: bool
    end: float
    models: Sequence[str]
    batches: Sequence[int]
    variants: Sequence[str]
    compile_seconds: float
    path: Path
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """float16, but for a dry run on the CPU."""
        return torch.float16 if self.device == "cuda" else torch.float32

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def keep(self, step: str, found: Any) -> None:
        """Put what a step found into the record, and write it."""
        self.record[step] = found
        write_json(self.path, self.record)

    def images(self, count: int, pixels: int = 224) -> Tensor:
        """Normal numbers in the place, type and layout to measure in."""
        x = torch.randn(count, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))
        return x.to(self.device, self.dtype).contiguous(memory_format=torch.channels_last)


def main(arguments: Sequence[str] | None = None) -> int:
    """Take the steps that there is time for; return 1 if a test failed or a network computed something else."""
    options = read_options(arguments)
    if options.page:
        print(page(options.page))
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks.cuda: error: torch sees no CUDA device; try --device cpu --dry", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    path = options.output / f"cuda-{re.sub(r'[^A-Za-z0-9]+', '-', name).lower()}{'-dry' if options.dry else ''}.json"
    session = Session(
        device=options.device,
        dry=options.dry,
        end=time.monotonic() + 60 * options.minutes,
        models=options.models[:1] if options.dry else options.models,
        batches=(2,) if options.dry else options.batches,
        variants=("kernels overlap", "filters") if options.dry else options.variants,
        compile_seconds=options.compile_seconds,
        path=path,
    )
    session.keep("environment", environment())
    with tuned_cudnn():
        for step in options.steps or STEPS:
            if session.left < RESERVE_SECONDS:
                session.keep(step, {"skipped": f"{session.left:.0f} s were left"})
                continue
            started = time.monotonic()
            try:
                STEPS[step](session)
            except Exception as error:  # the steps after it are worth having all the same
                session.keep(step, {"error": f"{type(error).__name__}: {error}"[:500]})
            took = time.monotonic() - started
            session.keep("seconds", {**session.record.get("seconds", {}), step: round(took, 1)})
            print(f"{step}: {took:.0f} s, {session.left:.0f} s left, in {path}", flush=True)
    path.with_suffix(".md").write_text(page(path), encoding="utf-8")
    return int(is_wrong(session.record))


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What to measure, and for how long."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="stop after about so long (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="folder of the record")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--dry", action="store_true", help="tiny sizes: only whether it runs")
    parser.add_argument("--steps", nargs="+", choices=tuple(STEPS), metavar="STEP", help=f"some of {', '.join(STEPS)}")
    parser.add_argument(
        "--models", nargs="+", default=MODELS, help="names for `fxprune compile` (default: %(default)s)"
    )
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES, help="images (default: %(default)s)")
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=tuple(VARIANTS), metavar="NAME")
    parser.add_argument("--compile-seconds", type=float, default=COMPILE_SECONDS, help="for torch.compile, 0: without")
    parser.add_argument("--page", type=Path, metavar="RECORD", help="only print the tables of a record")
    options = parser.parse_args(arguments)
    if options.output is None and options.page is None:
        parser.error("--output DIR is needed: where the record goes")
    return options


def is_wrong(record: Mapping[str, Any]) -> bool:
    """Whether a test failed, a step ended in an error, or a network computed something else."""
    rows = [row for race in record.get("networks", ()) for row in race["rows"]] if "networks" in record else []
    failed = any("error" in found for found in record.values() if isinstance(found, Mapping))
    return failed or any(row["error"].startswith("wrong") for row in rows)


# --- the steps --------------------------------------------------------------------------------------------------------


def tests(session: Session) -> None:
    """Run `pytest -m cuda` in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", "-p", "no:cacheprovider"]
    marked = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.cuda" in path.read_text()]
    command += marked[:1] if session.dry else marked
    if is_installed("xdist") and not session.dry:
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    try:
        limit = min(TEST_SECONDS, session.left)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
        lines, code = done.stdout.splitlines(), done.returncode
    except subprocess.TimeoutExpired as late:
        output = late.stdout or b""
        lines, code = (output.decode() if isinstance(output, bytes) else output).splitlines(), None
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    found = {"exit code": code, "summary": lines[-1] if lines else "", "failed": failed}
    session.keep("tests", found | ({"error": "not all passed"} if code not in (0, 5) else {}))


def networks(session: Session) -> None:
    """Race whole networks, dense and pruned, as CUDA graphs and eagerly; then the dense ones in `torch.compile`."""
    pixels, rounds = (64, 1) if session.dry else (224, ROUNDS)
    runtimes = ["eager", "cudagraph", "accelerate+cudagraph"] if session.device == "cuda" else ["eager", "accelerate"]
    compilers = ["cudagraph", "max-autotune+cudagraph"] if session.device == "cuda" else ["eager", "compile"]
    made: dict[str, list[Network]] = {}
    races: list[dict[str, Any]] = []

    def race(model: str, batch: int, contestants: Sequence[Network], chosen: Sequence[str]) -> None:
        images = session.images(batch, pixels)
        rows = measure(contestants, chosen, ["channels_last"], images, rounds)
        races.append({"model": model, "batch": batch, "rows": [asdict(row) for row in rows]})
        session.keep("networks", races)

    for batch in session.batches:
        for model in session.models:
            if session.left < RESERVE_SECONDS:
                return
            if model not in made:
                made[model] = list(candidates(model, pixels, session))
            race(model, batch, made[model], runtimes)
            if session.compile_seconds and session.left > 2 * RESERVE_SECONDS:
                with time_limit(min(session.compile_seconds, session.left - RESERVE_SECONDS)):
                    race(model, batch, made[model][:1], compilers)


def layers(session: Session) -> None:
    """Time 3x3 layers in every form that there is."""
    stopwatch = Stopwatch(torch.device(session.device), remember=False)
    rows = []
    sizes = ((32, 8),) if session.dry else LAYERS
    for channels, pixels in sizes:
        for groups, share, block in LAYER_PLANS[:1] if session.dry else LAYER_PLANS:
            conv = grouped_layer(channels, groups, share, block).to(session.device, session.dtype)
            shapes = [torch.Size([2 if session.dry else LAYER_BATCH, channels, pixels, pixels])]
            forms = {
                str(form): form for form in all_forms() if not form.engine.obstacle(conv, torch.channels_last)
            }  # fmt: skip
            with torch.inference_mode():
                seconds = stopwatch.race(form_calls(forms, conv, shapes, torch.channels_last))
            rows.append({
                "channels": channels, "pixels": pixels, "batch": shapes[0][0], "groups": groups, "macs_share": share,
                "block": block, "seconds": seconds,
            })  # fmt: skip
            session.keep("layers", rows)


def target(session: Session) -> None:
    """Plan for a share of the dense time, and see what time comes out."""
    name = session.models[0]
    model = load_model(name).to(session.device, session.dtype).eval()
    x = session.images(session.batches[0], 64 if session.dry else 224)
    settle(model, x)
    where = "cuda" if session.device == "cuda" else "cpu"
    started = time.monotonic()
    pruned = fxprune.compile(model, latency=TARGET, target=where, example_inputs=x, verify=False)
    planned = time.monotonic() - started
    fast = fxprune.acceleration_report(pruned)
    assert fast.compiled is not None and fast.compiled.macs_pruned and fast.compiled.macs_dense  # noqa: PT018
    macs = fast.compiled.macs_pruned / fast.compiled.macs_dense
    found = {"model": name, "batch": len(x), "asked": TARGET, "reached": fast.relative, "macs_share": macs}
    session.keep("target", found | {"planning_seconds": planned, "chosen": fast.chosen})


def training(session: Session) -> None:
    """Fine-tune a pruned ResNet-20 for three epochs on images made here, and see that what is pruned stays zero."""
    count, batch = (64, 32) if session.dry else (TRAINING_IMAGES, 128)
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (count,), generator=generator)
    patterns = torch.randn(10, 3, 32, 32, generator=generator)
    images = (patterns[labels] + 2 * torch.randn(count, 3, 32, 32, generator=generator)).to(session.device)
    labels = labels.to(session.device)
    model = load_model("resnet20").to(session.device)
    plan = fxprune.make_plan(model, 0.5, example_inputs=images[:2])
    masked = fxprune.mask(model, plan).train()
    optimizer = torch.optim.SGD(masked.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    sparsifier = fxprune.hold(masked, plan, optimizer)
    epochs = []
    for _ in range(1 if session.dry else EPOCHS):
        started, total = time.monotonic(), 0.0
        for picked in torch.randperm(count, generator=generator).to(session.device).reshape(-1, batch):
            with torch.autocast(session.device, torch.bfloat16):
                loss = F.cross_entropy(masked(images[picked]), labels[picked])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.item() * len(picked)
        epochs.append({"loss": total / count, "seconds": time.monotonic() - started})
        session.keep("training", {"images": count, "epochs": epochs})
    kept = [bool((masked.get_parameter(f"{name}.weight") == 0).any()) for name in plan.layers]
    masked.eval()
    small = sparsifier.rewrite(images[:2])
    found = fxprune.verify(small, masked, images[:2]).max_rel
    session.keep("training", {"images": count, "epochs": epochs, "pruned": all(kept), "difference": found})


STEPS: Mapping[str, Callable[[Session], None]] = {
    "tests": tests, "networks": networks, "layers": layers, "target": target, "training": training,
}  # fmt: skip


# --- what is raced ----------------------------------------------------------------------------------------------------


def candidates(name: str, pixels: int, session: Session) -> Iterator[Network]:
    """The dense network and its rivals: kernels in both forms, and whole filters at equal MACs."""
    model = load_model(name).eval()
    inputs = torch.randn(2, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))
    settle(model, inputs)
    yield dense_network(model, inputs)
    for ratio, variants in RATIOS.items():
        for variant in [variant for variant in variants if variant in session.variants]:
            plan = {"target": "cuda", **VARIANTS[variant]}
            if variant == "filters":  # a ratio of filters takes more than that of the MACs
                plan["macs"] = 1 - ratio
            network = fxprune_network(model, inputs, None if "macs" in plan else ratio, plan)
            yield replace(network, name=variant, ratio=ratio)
        if is_installed("torch_pruning") and not session.dry:
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


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError inside after so many seconds; the main thread of a Unix process only."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done within {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, seconds))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    sys.exit(main())
