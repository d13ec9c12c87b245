"""`fxprune compile`: prune a model, check the smaller graph, write it."""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import fxprune
from fxprune.cli.data import add_calibration, inputs_for
from fxprune.cli.options import (
    MODEL_HELP,
    add_amounts,
    add_choices,
    add_gathers,
    add_model_options,
    add_output_options,
    inputs_of,
    model_of,
    pruning_of,
    warn_of_random_weights,
)
from fxprune.cli.output import Subparsers, show, shows_progress, verdict, warn
from fxprune.errors import AccelerationError, CalibrationError, PlanError, PoorAgreementWarning, TraceError
from fxprune.tables import terminal_width
from fxprune.vocabulary import AugmentName, Output

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fxprune.calibration.recovery import Recovery
    from fxprune.cli.data import Inputs
    from fxprune.comparison.evaluation import Evaluation
    from fxprune.comparison.worth import Worth

IN_FLOAT32 = {
    "int8": "what was written is in float32: fxprune.quantize(fxprune.accelerate(fxprune.load(FILE, model), x, "
    "runtime=...), images) makes integers of it",
    "bfloat16": "what was written is in float32: OpenVINO computes such an ONNX file in bfloat16 by default where the "
    "processor has it; fxprune.accelerate(fxprune.load(FILE, model), x, runtime='openvino', precision='bfloat16') "
    "makes an .xml",
}
"""What becomes of files that were planned for a precision."""
EXAMPLES = """\
examples:
  fxprune compile resnet50 --ratio 0.5 -o resnet50.pt
  fxprune compile resnet18 --ratio 0.75 --form partition --ignore 'layer4.*' --torchscript resnet18.ts.pt
  fxprune compile timm:resnest14d --weights resnest14d.pth --json -o resnest.pt
  fxprune compile resnet50 --weights resnet50.pth --calibration photos/ --macs 0.5 -o resnet50.pt
  fxprune compile resnet50 --weights resnet50.pth --calibration photos/ --macs 0.5 --onnx resnet50.onnx --bench
  fxprune compile resnet50 --weights resnet50.pth --calibration photos/ --recover 300 --augment flip -o r50.pt
  fxprune compile resnet50 --weights resnet50.pth --calibration photos/ --latency 0.6 --target cpu -o resnet50.pt
  fxprune compile resnet50 --weights resnet50.pth --latency 0.6 --runtime onnxruntime --onnx resnet50.onnx
  fxprune compile resnet50 --weights resnet50.pth --latency 0.6 --runtime onnxruntime --precision int8 -o resnet50.pt
  fxprune compile resnet50 --weights resnet50.pth --granularity filter --macs 0.5 --params 0.4 -o resnet50.pt
  fxprune compile resnet50 --weights resnet50.pth --granularity filter:0.25,kernel:0.5 -o resnet50.pt
  fxprune compile resnet50 --weights resnet50.pth --calibration images.npy --granularity auto --macs 0.5 -o resnet50.pt
  fxprune compile mynets:small --weights last.pt --method tmi --snapshots epoch1.pt epoch2.pt --calibration images.pt
"""


def add_to(subparsers: Subparsers) -> None:
    """Add the subcommand."""
    parser = subparsers.add_parser("compile", help="prune a model and write the smaller one", epilog=EXAMPLES)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    add_model_options(parser)
    add_amounts(parser)
    add_calibration(parser)
    add = parser.add_argument_group("recovery").add_argument
    add(
        "--recover", nargs="?", type=float, const=True, metavar="SECONDS",
        help="after the refit train the kept weights on the --calibration inputs, without labels, until each block "
        "gives what the dense one gives: so many seconds (default: at most three minutes)",
    )  # fmt: skip
    add(
        "--augment",
        choices=get_args(AugmentName),
        help="for --recover: mirror or shift the inputs, where they are images",
    )
    add = parser.add_argument_group("what to write, and to check").add_argument
    add("-o", "--output", type=Path, metavar="FILE", help="where fxprune.save puts the result")
    add("--onnx", type=Path, metavar="FILE", help="also write an ONNX file (batch size free)")
    add("--torchscript", type=Path, metavar="FILE", help="also write a TorchScript file")
    add(
        "--result",
        choices=get_args(Output),
        default="auto",
        help="a traced graph, the model's own class with smaller layers, or whichever is right (default)",
    )
    add(
        "--bench",
        action="store_true",
        help="time it against the dense network in ONNX Runtime and OpenVINO, or else in PyTorch, and say whether it "
        "is worth it; --onnx is then written as is fastest there",
    )
    add("--no-verify", action="store_true", help="skip the check against the masked model")
    add_choices(parser)
    add_gathers(parser)
    add_output_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Compile as asked; return the exit code."""
    from fxprune.api import request_of
    from fxprune.calibration.subject import Subject
    from fxprune.planning.compiling import compiled_for

    began = time.perf_counter()
    _check_targets(options)
    model = model_of(options.model, options)
    if not _targets(options):
        warn("nothing will be written: -o FILE, --onnx FILE or --torchscript FILE says where")
    warn_of_random_weights(options)
    recovery = _recovery_of(options)
    given = inputs_for(model, options)
    calibration = None if given is None else given.calibration
    inputs = inputs_of(model, options, calibration)
    asked = pruning_of(options) | {"recover": False if recovery is None else recovery}
    request = request_of({"model": model, **asked})
    subject = Subject(model, inputs, calibration, options.result if request.target is None else "graph")
    with warnings.catch_warnings():
        if given is not None and given.held_out is not None:  # more pictures, that nothing was fitted to, judge later
            warnings.simplefilter("ignore", PoorAgreementWarning)
        done = compiled_for(subject, request, check=not options.no_verify)
    pruned, check = done.pruned, done.check
    worth = _worth(model, pruned, inputs, options) if options.bench else None
    written = _write(pruned, inputs, options, worth)
    report = fxprune.report(pruned)
    evaluation = _evaluated(pruned, model, given)
    _warn_of_poor(evaluation, done.plan, recovered=recovery is not None)
    document = {
        "model": options.model,
        "weights": None if options.weights is None else str(options.weights),
        "calibration": None if options.calibration is None else str(options.calibration),
        "files": written,
        "report": report.to_dict(),
        "evaluation": None if evaluation is None else evaluation.to_dict(),
        "verification": None if check is None else asdict(check),
        "time": None if worth is None else worth.to_dict(),
        "seconds": time.perf_counter() - began,
    }
    lines = [
        report.describe(gathers=options.gathers, width=terminal_width()),
        "",
        *([] if given is None else [given.told]),
        *([] if evaluation is None else [str(evaluation)]),
        verdict(check),
        *(f"wrote {path} ({kind})" for kind, path in written.items()),
        *([] if options.precision is None else [IN_FLOAT32[options.precision]]),
        *([] if worth is None else [str(worth)]),
    ]
    return show(options, document, "\n".join(lines))


def _evaluated(pruned: nn.Module, dense: nn.Module, given: Inputs | None) -> Evaluation | None:
    """How good the result is on pictures that were held back; None if there are none."""
    from fxprune.comparison.evaluation import HELD_BACK, evaluate

    if given is None or given.held_out is None:
        return None
    return evaluate(pruned, given.held_out, given.labels, dense, source=given.source, which=HELD_BACK)


def _warn_of_poor(evaluation: Evaluation | None, plan: fxprune.PrunePlan, *, recovered: bool) -> None:
    """Say so where pictures that nothing was calibrated with are judged otherwise than by the dense network: those that
    were held out of the calibration may be too few to show it.
    """
    from fxprune.planning.lossy import way_out

    found = None if evaluation is None else evaluation.agreement
    if evaluation is not None and found is not None and found.is_poor:
        warn(
            f"on {evaluation.inputs} {evaluation.which} only {found.share:.1%} agree with the dense network; "
            f"{way_out(plan, recovered=recovered)}"
        )


def _worth(dense: nn.Module, pruned: nn.Module, inputs: tuple[Tensor], options: argparse.Namespace) -> Worth | None:
    """Whether the result is faster, one input at a time; None, and a warning, if it cannot be accelerated."""
    from fxprune.comparison.worth import measure_worth

    try:
        return measure_worth(dense, pruned, inputs[0][:1], progress=shows_progress(options))
    except (AccelerationError, TraceError) as error:
        warn(f"not timed: {error}")
        return None


def _recovery_of(options: argparse.Namespace) -> Recovery | None:
    """How long to recover and with what; None if that was not asked for.

    Raises:
        PlanError, CalibrationError: an option is missing beside another.
    """
    from fxprune.calibration.recovery import Recovery

    if options.recover is None:
        if options.augment is not None:
            raise PlanError("--augment is for --recover; add that, or leave it out")
        return None
    if options.calibration is None:
        raise CalibrationError("--recover learns from calibration data; add --calibration FILE, or leave it out")
    return Recovery(seconds=None if options.recover is True else options.recover, augment=options.augment)


def _targets(options: argparse.Namespace) -> dict[str, Path]:
    """The files that were asked for, by kind."""
    targets = {"fxprune": options.output, "TorchScript": options.torchscript, "ONNX": options.onnx}
    return {kind: path for kind, path in targets.items() if path is not None}


def _check_targets(options: argparse.Namespace) -> None:
    """See that the files can be written, before hours of work.

    Raises:
        StorageError: one cannot.
        FxpruneError: what writes one is not installed.
    """
    targets = _targets(options)
    if not targets:
        return
    from fxprune.exports import check_onnx
    from fxprune.files import check_writable

    for path in targets.values():
        check_writable(path)
    if "ONNX" in targets:
        check_onnx()


def _write(
    pruned: nn.Module, inputs: tuple[Tensor], options: argparse.Namespace, worth: Worth | None
) -> dict[str, str]:
    """Write the files that were asked for, of ONNX that which was timed if it was; return the path of each kind."""
    from fxprune.exports import save_onnx, save_torchscript

    written = _targets(options)
    for path in written.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    if "fxprune" in written:
        fxprune.save(pruned, written["fxprune"])
    if "TorchScript" in written:
        save_torchscript(pruned, written["TorchScript"])
    timed = None if worth is None else worth.models.get("onnxruntime")
    if "ONNX" in written and timed is not None:
        timed.save(written["ONNX"])
    elif "ONNX" in written:
        save_onnx(pruned, inputs, written["ONNX"])
    return {kind: str(path) for kind, path in written.items()}
