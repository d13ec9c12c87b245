"""The console command `fxprune`.

stdout carries the result, a table or with `--json` one JSON document; progress bars and warnings go to stderr.
Exit codes: 0 done; 1 the compiled model does not compute what the masked one does; 2 an error in what was asked;
130 interrupted.
"""

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO, get_args

import numpy as np
import torch
from torch import Tensor, fx, nn
from tqdm import tqdm

import fxprune
from fxprune.cli import demo
from fxprune.criteria import CRITERIA
from fxprune.criteria.variety import VARIETIES
from fxprune.errors import CalibrationError, FxpruneError, VerificationError
from fxprune.exact.record import record_of
from fxprune.exports import save_onnx, save_torchscript
from fxprune.models import default_input_size, example_inputs, load_model
from fxprune.planning import METHODS
from fxprune.planning.requests import Scope
from fxprune.plans.shapes import TARGETS

EPILOG = """\
examples:
  fxprune demo                                             train, compile and compare a small network
  fxprune compile resnet50 --ratio 0.5 -o resnet50.pt      prune half of the kernel groups of a torchvision model
  fxprune compile resnet50 --weights resnet50.pth --calibration images.pt --macs 0.5 -o resnet50.pt
  fxprune compile mynets:small --weights small.pt --input-size 2,3,32,32 -o small-pruned.pt
  fxprune report resnet50.pt resnet50                      what became of each convolution
  fxprune verify resnet50.pt resnet50                      does the file still compute what it should?
  fxprune analyze densenet121                              the channel spaces: who ties them, which may be permuted
"""

EPILOG_COMPILE = """\
examples:
  fxprune compile resnet50 --ratio 0.5 -o resnet50.pt
  fxprune compile resnet18 --ratio 0.75 --form partition --ignore 'layer4.*' --torchscript resnet18.ts.pt
  fxprune compile timm:resnest14d --weights resnest14d.pth --json -o resnest.pt
  fxprune compile resnet50 --weights resnet50.pth --calibration images.npy --macs 0.5 -o resnet50.pt
  fxprune compile resnet50 --weights resnet50.pth --calibration images.npy --latency 0.6 --target cpu -o resnet50.pt
  fxprune compile resnet50 --weights resnet50.pth --granularity filter --macs 0.5 --scope global -o resnet50.pt
  fxprune compile resnet50 --weights resnet50.pth --granularity filter:0.25,kernel:0.5 -o resnet50.pt
  fxprune compile mynets:small --weights last.pt --method tmi --snapshots epoch1.pt epoch2.pt --calibration images.pt
"""

MODEL_HELP = "a torchvision model, a timm model (timm:NAME), or module:callable"
FILE_HELP = "a file that `fxprune compile -o` wrote"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments`, by default those of the process; return the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        with _warnings_in_one_line():
            code: int = options.run(options)
    except VerificationError as error:
        return _complain(error, 1)
    except BrokenPipeError:  # `fxprune analyze ... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (FxpruneError, OSError) as error:
        return _complain(error, 2)
    except KeyboardInterrupt:
        return 130
    return code


def _complain(error: Exception, code: int) -> int:
    print(f"fxprune: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Show warnings as `fxprune: warning: ...`, without the source line that raised them."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        print(f"fxprune: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fxprune",
        description="Turn the convolutions of a network into clustered, pruned and permuted grouped convolutions, "
        "and check that the smaller graph computes exactly what the masked network does.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fxprune {fxprune.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    compile_ = commands.add_parser("compile", help="prune a model and write the smaller one", epilog=EPILOG_COMPILE)
    compile_.formatter_class = argparse.RawDescriptionHelpFormatter
    compile_.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    _add_pruning_options(compile_)
    _add_model_options(compile_)
    compile_.add_argument("-o", "--output", type=Path, metavar="FILE", help="where fxprune.save puts the result")
    compile_.add_argument("--torchscript", type=Path, metavar="FILE", help="also write a TorchScript file")
    compile_.add_argument("--onnx", type=Path, metavar="FILE", help="also write an ONNX file (batch size free)")
    compile_.add_argument("--no-verify", action="store_true", help="skip the check against the masked model")
    _add_output_options(compile_)
    compile_.set_defaults(run=_compile)

    report = commands.add_parser("report", help="show what became of each convolution")
    report.add_argument("source", metavar="FILE|MODEL", help=f"{FILE_HELP}, or {MODEL_HELP}")
    report.add_argument("model", nargs="?", metavar="MODEL", help="the model that FILE was made from")
    _add_pruning_options(report)
    _add_model_options(report)
    _add_output_options(report)
    report.set_defaults(run=_report)

    verify = commands.add_parser("verify", help="check a saved file against the masked model it came from")
    verify.add_argument("file", metavar="FILE", type=Path, help=FILE_HELP)
    verify.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    verify.add_argument(
        "--calibration", type=Path, metavar="DATA", help="the data that FILE was compiled with, if it was with any"
    )
    _add_model_options(verify)
    _add_output_options(verify)
    verify.set_defaults(run=_verify)

    analyze = commands.add_parser("analyze", help="show the channel spaces of a model")
    analyze.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    _add_model_options(analyze)
    _add_output_options(analyze)
    analyze.set_defaults(run=_analyze)

    show = commands.add_parser("demo", help="train a small network on digits, compile it, compare")
    show.add_argument("--output", type=Path, default=Path("fxprune-demo"), metavar="DIR", help="default: %(default)s")
    show.add_argument("--ratio", type=float, default=0.5, help="share of kernel groups to prune (%(default)s)")
    show.add_argument("--epochs", type=int, default=12, help="of training (default: %(default)s)")
    show.add_argument("--seed", type=int, default=0)
    _add_output_options(show)
    show.set_defaults(run=_demo)
    return parser


def _add_pruning_options(parser: argparse.ArgumentParser) -> None:
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--ratio", type=float, help="share of kernel groups, or filters, to prune from each convolution (0.5)"
    )
    size.add_argument(
        "--macs",
        type=float,
        metavar="SHARE",
        help="instead: share of multiply-accumulates to keep, in (0, 1]; sensitive layers are pruned less",
    )
    size.add_argument("--params", type=float, metavar="SHARE", help="instead: share of parameters to keep, in (0, 1]")
    size.add_argument(
        "--latency",
        type=float,
        metavar="SHARE",
        help="instead: share of the time of the best dense form that may remain on --target, in (0, 1]",
    )
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="a few hundred typical inputs (N, ...) as the model reads them, normalized, on which the kept weights are "
        "refitted: a tensor in a .pt or .pth file, or an array in a .npy file",
    )
    parser.add_argument(
        "--granularity",
        type=_granularity,
        metavar="kernel|filter|filter:R,kernel:R",
        help="prune kernels, so that convolutions become grouped (default), or whole filters, so that they become "
        "narrower; or filters at one ratio, then kernels at another",
    )
    parser.add_argument(
        "--scope",
        choices=get_args(Scope),
        help="filters: the same share of each layer, or all ranked together (default: local)",
    )
    parser.add_argument("--round-to", type=int, metavar="N", help="filters: keep a multiple of N in each layer")
    parser.add_argument("--groups", type=_groups, default="auto", metavar="N|auto", help="groups per convolution")
    parser.add_argument("--form", choices=("auto", "partition", "overlap"), default="auto", help="default: %(default)s")
    parser.add_argument(
        "--block",
        type=int,
        metavar="N",
        help="keep input channels in aligned blocks of N, for wide loads (default: 8 for target cuda, else 1)",
    )
    parser.add_argument("--target", choices=TARGETS, help="kind of device to plan groups and blocks for")
    parser.add_argument(
        "--share-groups",
        action=argparse.BooleanOptionalAction,
        help="group the filters of all layers that write the same channels alike, which saves gathers "
        "(default: with --target)",
    )
    parser.add_argument(
        "--method", default="auto", help=f"how kernels are chosen: {', '.join(METHODS)} (default: %(default)s)"
    )
    parser.add_argument(
        "--criterion",
        help=f"importance of a filter, or of a kernel for method cocluster: {', '.join(CRITERIA)} (default: l2)",
    )
    parser.add_argument("--variety", help=f"make the criterion keep rare kernels or filters: {', '.join(VARIETIES)}")
    parser.add_argument(
        "--snapshots",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="state dicts from earlier in the same training run, oldest first; for method tmi and some criteria",
    )
    parser.add_argument(
        "--ignore", action="append", default=[], metavar="PATTERN", help="module names to leave dense; may be repeated"
    )


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", type=Path, metavar="FILE", help="state dict of MODEL (default: random weights)")
    parser.add_argument(
        "--input-size", type=_size, metavar="N,C,H,W", help="shape of the example input (default: 2,3,224,224 or alike)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of random weights and of the plan (default: %(default)s)")


def _add_output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def _groups(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither an integer nor 'auto'") from None


def _granularity(text: str) -> str | dict[str, float]:
    if ":" not in text:
        return text
    try:
        return {name.strip(): float(share) for name, share in (part.split(":") for part in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither 'kernel' nor 'filter' nor a ratio for both, as in filter:0.25,kernel:0.5"
        ) from None


def _size(text: str) -> tuple[int, ...]:
    try:
        size = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        size = ()
    if not size or min(size) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; give positive integers, as in 2,3,224,224")
    return size


def _compile(options: argparse.Namespace) -> int:
    began = time.perf_counter()
    model = _model(options.model, options)
    calibration = _calibration(options)
    inputs = _inputs(model, options, calibration)
    with _steps(4, options) as step:
        step("planning")
        plan = fxprune.make_plan(model, example_inputs=inputs, calibration=calibration, **_pruning(options))
        step("masking")
        masked = fxprune.mask(model, plan, calibration, progress=_progress(options))
        step("rewriting")
        pruned = fxprune.rewrite(masked, plan, inputs)
        step("checking")
        check = None if options.no_verify else fxprune.verify(pruned, masked, inputs)
    written = _write(pruned, inputs, options)
    report = fxprune.report(pruned)
    document = {
        "model": options.model,
        "weights": None if options.weights is None else str(options.weights),
        "calibration": None if options.calibration is None else str(options.calibration),
        "files": written,
        "report": report.to_dict(),
        "verification": None if check is None else asdict(check),
        "seconds": time.perf_counter() - began,
    }
    lines = [str(report), "", _verdict(check), *(f"wrote {path} ({kind})" for kind, path in written.items())]
    return _show(options, document, "\n".join(lines))


def _report(options: argparse.Namespace) -> int:
    if options.model is None and Path(options.source).is_file():
        raise FxpruneError(f"{options.source}: is a file; name its model too: fxprune report {options.source} MODEL")
    model = _model(options.model or options.source, options)
    with _steps(1, options) as step:
        if options.model:
            step("loading")
            pruned = fxprune.load(options.source, model)
        else:
            step("compiling")
            calibration = _calibration(options)
            inputs = _inputs(model, options, calibration)
            # Not fxprune.compile: a plan for a device can be reported where there is none.
            plan = fxprune.make_plan(model, example_inputs=inputs, calibration=calibration, **_pruning(options))
            pruned = fxprune.rewrite(fxprune.mask(model, plan, calibration), plan, inputs)
    report = fxprune.report(pruned)
    return _show(options, report.to_dict(), str(report))


def _verify(options: argparse.Namespace) -> int:
    model = _model(options.model, options)
    calibration = _calibration(options)
    with _steps(3, options) as step:
        step("loading")
        pruned = fxprune.load(options.file, model)
        step("masking")
        masked = fxprune.mask(model, record_of(pruned).plan, calibration, progress=_progress(options))
        step("checking")
        try:
            check = fxprune.verify(pruned, masked, _inputs(model, options, calibration))
        except VerificationError as error:
            if calibration is not None:
                raise
            hint = "if it was compiled with --calibration, give the same data"
            raise VerificationError(f"{error}; {hint}") from error
    return _show(options, asdict(check), _verdict(check))


def _analyze(options: argparse.Namespace) -> int:
    model = _model(options.model, options)
    with _steps(1, options) as step:
        step("analyzing")
        analysis = fxprune.analyze(model, _inputs(model, options))
    spaces = [asdict(space) for space in analysis.spaces]
    document = {"model": options.model, "spaces": spaces, "boundaries": dict(analysis.boundaries)}
    return _show(options, document, str(analysis))


def _demo(options: argparse.Namespace) -> int:
    result = demo.run(
        options.output,
        ratio=options.ratio,
        epochs=options.epochs,
        seed=options.seed,
        progress=_progress(options),
    )
    return _show(options, result.to_dict(), str(result))


def _model(name: str, options: argparse.Namespace) -> nn.Module:
    return load_model(name, options.weights, options.seed)


def _inputs(model: nn.Module, options: argparse.Namespace, calibration: Tensor | None = None) -> tuple[Tensor]:
    if calibration is not None and options.input_size is None:
        return (calibration[:2],)
    return example_inputs(options.input_size or default_input_size(model), options.seed)


def _calibration(options: argparse.Namespace) -> Tensor | None:
    """The inputs in the file that `--calibration` names, `(N, ...)` float32.

    Raises:
        CalibrationError: the file cannot be read, or holds something else.
    """
    path: Path | None = options.calibration
    if path is None:
        return None
    try:
        if path.suffix == ".npy":
            content = torch.from_numpy(np.load(path, allow_pickle=False))
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read: {error.strerror or error}") from error
    except Exception as error:  # foreign bytes: UnpicklingError, ValueError, EOFError, ...
        opener = "numpy.load" if path.suffix == ".npy" else "torch.load(weights_only=True)"
        raise CalibrationError(f"{path}: is no file that {opener} opens; save one tensor or array (N, ...)") from error
    if not isinstance(content, Tensor):
        raise CalibrationError(f"{path}: holds a {type(content).__name__}; save one tensor or array (N, ...)")
    if not content.is_floating_point():
        raise CalibrationError(
            f"{path}: holds {str(content.dtype).removeprefix('torch.')}; save the inputs as the model reads them, "
            "floating-point and normalized"
        )
    if content.dim() < 2 or not content.numel():
        raise CalibrationError(f"{path}: has shape {tuple(content.shape)}; it must hold at least one input, (N, ...)")
    return content.detach().float()


def _pruning(options: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `fxprune.make_plan`; what was not asked for is left to its defaults."""
    sizes = ("ratio", "macs", "params", "latency", "groups", "form", "block", "target", "share_groups")
    names = (*sizes, "granularity", "scope", "round_to", "method", "criterion", "variety", "snapshots", "ignore")
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    return given | {"seed": options.seed, "progress": _progress(options)}


def _progress(options: argparse.Namespace) -> bool:
    return sys.stderr.isatty() and not options.quiet


@contextmanager
def _steps(count: int, options: argparse.Namespace) -> Iterator[Callable[[str], None]]:
    """Yield a function that names the step that begins; a bar on stderr counts the steps that are over."""
    layout = "{desc:<12}{bar}{n_fmt}/{total_fmt} {elapsed}"
    with tqdm(total=count, disable=not _progress(options), bar_format=layout) as bar:
        begun = False

        def step(label: str) -> None:
            nonlocal begun
            bar.update(int(begun))
            bar.set_description_str(label)
            begun = True

        yield step
        bar.update(int(begun))


def _write(pruned: fx.GraphModule, inputs: tuple[Tensor], options: argparse.Namespace) -> dict[str, str]:
    """Write the files that were asked for; return the path of each kind."""
    targets = {"fxprune": options.output, "TorchScript": options.torchscript, "ONNX": options.onnx}
    written = {kind: path for kind, path in targets.items() if path is not None}
    for path in written.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    if "fxprune" in written:
        fxprune.save(pruned, written["fxprune"])
    if "TorchScript" in written:
        save_torchscript(pruned, written["TorchScript"])
    if "ONNX" in written:
        save_onnx(pruned, inputs, written["ONNX"])
    return {kind: str(path) for kind, path in written.items()}


def _verdict(check: fxprune.Verification | None) -> str:
    if check is None:
        return "not verified (--no-verify)"
    return f"verified: compiled equals masked; largest difference {check.max_abs:.1e} ({', '.join(check.modes)} mode)"


def _show(options: argparse.Namespace, document: dict[str, Any], text: str) -> int:
    print(json.dumps(document, indent=2) if options.json else text)
    return 0
