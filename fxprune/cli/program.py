"""The console command `fxprune`.

stdout carries the result, a table or with `--json` one JSON document (`train` and `compare` tell what they do as they
do it); progress bars and warnings go to stderr.
Exit codes: 0 done; 1 the compiled model does not compute what the masked one does, or a part of what was asked failed;
2 an error in what was asked, or a file that cannot be read or written; 130 (143) interrupted.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

import fxprune
from fxprune.cli import (
    command_analyze,
    command_bench,
    command_compare,
    command_compile,
    command_demo,
    command_eval,
    command_report,
    command_sweep,
    command_train,
    command_verify,
)
from fxprune.errors import FxpruneError, VerificationError, near_matches

COMMANDS = (
    command_compile,
    command_report,
    command_verify,
    command_eval,
    command_analyze,
    command_bench,
    command_sweep,
    command_train,
    command_compare,
    command_demo,
)
"""In the order of `fxprune --help`."""

EXIT_CODES = """\
exit codes: 0 done; 1 a network does not compute what it should, or a part of what was asked failed; 2 an error in what
was asked, or a file that cannot be read or written; 130 (143) interrupted
"""
EPILOG = f"""\
examples:
  fxprune demo                                             train, compile and compare a small network
  fxprune compile resnet50 --ratio 0.5 -o resnet50.pt      prune half of the kernel groups of a torchvision model
  fxprune compile resnet50 --pretrained --calibration photos/ --macs 0.5 -o resnet50.pt --onnx resnet50.onnx
  fxprune sweep resnet50 --pretrained --calibration photos/ --lose 1             how small may it be?
  fxprune compile mynets:small --weights small.pt --input-size 2,3,32,32 -o small-pruned.pt
  fxprune report resnet50.pt resnet50                      what became of each convolution
  fxprune eval resnet50.pt resnet50 --pretrained --data photos/                  how good is it?
  fxprune verify resnet50.pt resnet50 --pretrained --calibration photos/         does it compute what it should?
  fxprune analyze densenet121                              the channel spaces: who ties them, which may be permuted
  fxprune bench resnet50 --runtime eager,accelerate        is it faster, here and now?
  fxprune train resnet20 --weights resnet20.th --data cifar10:DIR --ratio 0.5 --epochs 5 --output runs/resnet20
  fxprune compare resnet20 --weights resnet20.th --data cifar10:DIR --epochs 1 --output runs/compared

{EXIT_CODES}"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line `arguments`, by default those of the process; return the exit code."""
    options = read(arguments)
    try:
        with _warnings_in_one_line():
            code: int = options.run(options)
    except VerificationError as error:
        return _complain(error, 1)
    except BrokenPipeError:  # `fxprune analyze ... | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except FxpruneError as error:
        return _complain(error, 2)
    except OSError as error:
        return _complain(_sentence(error), 2)
    except KeyboardInterrupt:
        return 130
    return code


def read(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; what is wrong in it ends the process with the usage of its subcommand and exit code 2."""
    parser, subcommands = _parsers()
    given = sys.argv[1:] if arguments is None else list(arguments)
    options, unknown = parser.parse_known_args(given)
    if unknown:
        command = subcommands[next(word for word in given if word in subcommands)]
        known = [name for action in command._actions for name in action.option_strings]
        near = near_matches(unknown[0].partition("=")[0], known)
        command.error(f"unrecognized arguments: {' '.join(unknown)}{near}")
    return options


def _complain(error: Exception | str, code: int) -> int:
    print(f"fxprune: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _sentence(error: OSError) -> OSError | str:
    """What the operating system refused, without its number."""
    said = [str(part) for part in (error.filename, error.strerror) if part]
    return ": ".join(said) if error.strerror else error


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


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser, and that of each subcommand."""
    parser = argparse.ArgumentParser(
        prog="fxprune",
        description="Turn the convolutions of a network into clustered, pruned and permuted grouped convolutions, "
        "and check that the smaller graph computes exactly what the masked network does.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fxprune {fxprune.__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_to(subparsers)
    for subparser in subparsers.choices.values():
        subparser.usage = _usage(subparser)
    return parser, dict(subparsers.choices)


def _usage(parser: argparse.ArgumentParser) -> str:
    """What must be given; argparse would list every option, which its help does anyway."""
    words = []
    for action in parser._actions:
        if not action.option_strings:
            words.append(f"[{action.metavar}]" if action.nargs == "?" else str(action.metavar))
        elif action.required:
            words.append(f"{action.option_strings[0]} {action.metavar or action.dest.upper()}")
    return " ".join(["%(prog)s", *words, "[options]"])
