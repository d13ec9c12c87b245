"""Values of options: each function reads one from the command line, or says what is wrong with it."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, get_args

from fxprune.errors import near_matches
from fxprune.vocabulary import GranularityChoice


def either(kind: object) -> str:
    """The names that one of the types of `fxprune.vocabulary` has, with commas between."""
    return ", ".join(get_args(kind))


def groups(text: str) -> int | str:
    """A number of groups, or `"auto"`."""
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither an integer nor 'auto'") from None


def granularity(text: str) -> str | dict[str, float]:
    """A name, or a ratio for each: `filter:0.25,kernel:0.5`."""
    if ":" not in text:
        if text not in get_args(GranularityChoice):
            near = near_matches(text, get_args(GranularityChoice))
            raise argparse.ArgumentTypeError(f"{text!r} is none of {either(GranularityChoice)}{near}")
        return text
    try:
        return {name.strip(): float(share) for name, share in (part.split(":") for part in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither 'kernel' nor 'filter' nor a ratio for both, as in filter:0.25,kernel:0.5"
        ) from None


def size(text: str) -> tuple[int, ...]:
    """A number of pixels, `224`, or a shape: `2,3,224,224` or `2x3x224x224`."""
    try:
        shape = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; give pixels, as in 224, or a shape, as in 2,3,224,224")
    return shape


def numbers(text: str) -> tuple[float, ...]:
    """Numbers with commas between."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} are no numbers; give them as in 0.485,0.456,0.406") from None


def count(text: str) -> int:
    """A positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no count; give a positive integer")
    return int(text)


def span(text: str) -> range:
    """Whole numbers from a first to a last one: `35-70`, or one alone."""
    first, dash, last = text.partition("-")
    last = last if dash else first
    if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"{text!r} is no span; give a first and a last number, as in 35-70")
    return range(int(first), int(last) + 1)


def seeds(text: str) -> list[int]:
    """Seeds with commas between."""
    parts = text.split(",")
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} are no seeds; give integers from 0, as in 0,1,2")
    return [int(part) for part in parts]


def fraction(what: str, example: str) -> Callable[[str], float]:
    """A reader of numbers between 0 and 1, which are called `what`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value < 1:
            raise argparse.ArgumentTypeError(f"{text!r} is no {what}; give numbers between 0 and 1, as in {example}")
        return value

    return read


def list_of(read: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A reader of what commas part, each once."""
    return lambda text: list(dict.fromkeys(read(part) for part in text.split(",")))


def some_of(what: str, legal: Sequence[str]) -> Callable[[str], list[Any]]:
    """A reader of names with commas between, each one of `legal`."""

    def read(name: str) -> str:
        if name not in legal:
            raise argparse.ArgumentTypeError(
                f"there is no {what} {name!r}{near_matches(name, legal)}; choose from {', '.join(legal)}"
            )
        return name

    return list_of(read)


def distillation(text: str) -> tuple[float, float]:
    """Weight and temperature of a teacher."""
    weight, _, temperature = text.partition(":")
    try:
        return float(weight), float(temperature)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: must be WEIGHT:TEMPERATURE, such as 0.5:4") from None
