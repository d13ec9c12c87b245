"""Networks on which another pruner fails, compiled and checked: `python -m benchmarks.networks`.

The fifteen networks on which Torch-Pruning 1.6.1 crashes, does not finish within 120 s, or computes something else than
the masked model (measured on 66 networks, random halves of the channels, float64). For each: convolutions grouped,
gathers that remain, largest difference to the masked model. Writes a table in Markdown and a JSON record.
"""

import argparse
import gc
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import fxprune
from benchmarks._commands import add_output, output_of
from fxprune.environment import environment
from fxprune.files import write_json
from fxprune.models import load_model

RESULTS = "networks.json"
# What Torch-Pruning 1.6.1 does with them.
NETWORKS = {
    "shufflenet_v2_x1_0": "crashes",
    "timm:cspresnet50": "crashes",
    "timm:cspdarknet53": "crashes",
    "timm:nfnet_l0": "crashes",
    "timm:poolformer_s12": "crashes",
    "timm:tresnet_m": "crashes",
    "timm:res2net50_14w_8s": "crashes",
    "timm:skresnet18": "crashes",
    "timm:mixnet_s": "crashes",
    "convnext_tiny": "differs",
    "timm:edgenext_xx_small": "differs",
    "timm:convnextv2_atto": "differs",
    "timm:ecaresnet26t": "does not finish",
    "timm:rexnet_100": "does not finish",
    "timm:gc_efficientnetv2_rw_t": "does not finish",
}


def measure(name: str, ratio: float, size: int) -> dict[str, Any]:
    """Compile one network with random weights and statistics, and compare it with the masked model in both modes."""
    model = randomized(load_model(name))
    inputs = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    plan = fxprune.make_plan(model, ratio, example_inputs=inputs)
    masked = fxprune.mask(model, plan)
    pruned = fxprune.rewrite(masked, plan, inputs)
    seconds = time.perf_counter() - start
    check = fxprune.verify(pruned, masked, inputs)
    report = fxprune.report(pruned)
    return {
        "network": name,
        "grouped": report.rewritten,
        "convolutions": len(report.layers),
        "gathers": len(report.gathers),
        "macs_share": report.macs_pruned / report.macs_dense if report.macs_pruned and report.macs_dense else None,
        "largest_relative_difference": check.max_rel,
        "modes": check.modes,
        "compile_seconds": seconds,
        "torch_pruning": NETWORKS[name],
    }


def randomized(model: nn.Module) -> nn.Module:
    """Give every normalisation layer random statistics and parameters, so that no two channels are alike."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor_name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor.is_floating_point() or tensor.dim() != 1:
                continue
            noise = torch.rand(tensor.shape, generator=generator)
            positive = tensor_name.endswith(("running_var", "weight", "gamma"))
            tensor.copy_(noise + 0.5 if positive else noise - 0.5)
    return model.eval()


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown table of the results."""
    lines = [
        "| network | Torch-Pruning 1.6.1 | convolutions grouped | MACs left | gathers left | difference (float64) |",
        "|---|---|---|---|---|---|",
    ]
    lines.extend(
        f"| {row['network']} | {row['torch_pruning']} | {row['grouped']} of {row['convolutions']} "
        f"| {row['macs_share']:.0%} | {row['gathers']} | {row['largest_relative_difference']:.0e} |"
        for row in rows
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.networks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), metavar="NETWORK", help="default: all fifteen")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--size", type=int, default=96, help="height and width of the input in pixels")
    add_output(parser, RESULTS)
    options = parser.parse_args(arguments)
    rows = []
    for name in tqdm(options.networks, desc="networks"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torchvision and timm say of their own defaults
            rows.append(measure(name, options.ratio, options.size))
        gc.collect()
    record = {"environment": environment(), "ratio": options.ratio, "size": options.size, "results": rows}
    write_json(output_of(options, RESULTS), record)
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
