"""What the fields of a plan may hold, and what is said of those that hold something else.

Each function returns the value as a plan keeps it, and raises `PlanError` if it is none.
"""

import operator
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from fxprune.errors import PlanError

Value = TypeVar("Value")


def check_ratio(ratio: object) -> float:
    """Return `ratio` as a float in `[0, 1)`.

    Raises:
        PlanError: it is no number in that range.
    """
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
        raise PlanError(
            f"ratio is {_told(ratio)}; it must be a number in [0, 1), or map module-name patterns to numbers"
        )
    if not 0 <= ratio < 1:  # false for NaN too
        raise PlanError(f"ratio {ratio} is not in [0, 1): it is the share of kernel groups to remove; 0.5 removes half")
    return float(ratio)


def check_share(share: object, cost: str, whole: str = "the dense network's") -> None:
    """See that a budget is one: a share of the `whole`.

    Raises:
        PlanError: it is no number in `(0, 1]`.
    """
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        percent = f"; {share:g} % is {share / 100:g}" if isinstance(share, (int, float)) and 2 <= share <= 100 else ""
        raise PlanError(f"{cost} is {share!r}; it must be a share in (0, 1] of {whole}{percent}")


def check_seed(seed: object) -> None:
    """See that a seed is one.

    Raises:
        PlanError: it is no integer, or negative.
    """
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise PlanError(f"seed is {seed!r}; it must be an integer, 0 or more")


def freeze_ratio(ratio: object) -> float | Mapping[str, float]:
    """Return the ratio, or a read-only copy of the mapping from pattern to ratio.

    Raises:
        PlanError: a ratio is no number in `[0, 1)`, or a pattern is no string; the message names the pattern.
    """
    if not isinstance(ratio, Mapping):
        return check_ratio(ratio)
    checked = {}
    for pattern, value in ratio.items():
        if not isinstance(pattern, str):
            raise PlanError(f"ratio: {pattern!r} is not a string; map module-name patterns to ratios")
        try:
            checked[pattern] = check_ratio(value)
        except PlanError as error:
            raise PlanError(f"{pattern}: {error}") from error
    return MappingProxyType(checked)


def check_divisible(filters: int, groups: int) -> None:
    """See that groups of equal size exist.

    Raises:
        PlanError: `groups` does not divide `filters`; the message names the nearest divisors.

    >>> check_divisible(64, 6)
    Traceback (most recent call last):
    fxprune.errors.PlanError: 64 filters do not divide into 6 groups; use a divisor of 64, such as 4 or 8
    """
    if groups >= 1 and filters % groups == 0:
        return
    divisors = _divisors(filters)
    nearest = {
        max((d for d in divisors if d < groups), default=1),
        min((d for d in divisors if d > groups), default=filters),
    }
    ways = " or ".join(str(d) for d in sorted(nearest))
    raise PlanError(f"{filters} filters do not divide into {groups} groups; use a divisor of {filters}, such as {ways}")


def nearest_divisor(filters: int, groups: int) -> int | None:
    """The divisor of `filters` nearest to `groups`, the smaller of two; at least 2 if `groups` is. None if all are less
    than half of it or more than twice as many.

    >>> nearest_divisor(64, 6), nearest_divisor(12, 8), nearest_divisor(17, 8)
    (4, 6, None)
    """
    near = [d for d in _divisors(filters) if groups <= 2 * d <= 4 * groups and (d > 1 or groups < 2)]
    return min(near, key=lambda d: abs(d - groups), default=None)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _told(value: object) -> str:
    """A value in a message; of what is long only the type, with what may have been meant."""
    if isinstance(value, bool | int | float | str | None):
        return repr(value)
    return f"a {type(value).__name__} (inputs of the model are given by name: example_inputs=, calibration=)"


def set_field(instance: object, name: str, value: object) -> None:
    """Normalize a field of a frozen dataclass."""
    object.__setattr__(instance, name, value)


def integer(what: str, value: object) -> int:
    """Return an integer; `in_channels` and `block` must be positive."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]  # raises for what is no integer
    except TypeError:
        number = None
    positive = what in ("in_channels", "block")
    if number is None or isinstance(value, bool) or (positive and number < 1):
        rule = "a positive integer" if positive else "an integer"
        raise PlanError(f"{what} is {value!r}; it must be {rule}")
    return number


def share(what: str, value: object) -> float:
    """Return a number in `[0, 1]` as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise PlanError(f"{what} is {value!r}; it must be a number in [0, 1]")
    return float(value)


def rows(value: object) -> Iterable[object]:
    """Return the lists of `kept`."""
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        raise PlanError(f"kept is {value!r}; it must hold one list of input channels for each group")
    return value


def integers(what: str, values: object) -> tuple[int, ...]:
    """Return integers as a tuple."""
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise PlanError(f"{what} is {values!r}; it must be a list of integers")
    values = tuple(values)
    if set(map(type, values)) <= {int}:  # nothing to convert: a plan has hundreds of thousands
        return values
    return tuple(integer(f"an entry of {what}", value) for value in values)


def frozen(what: str, mapping: object, kind: type) -> Mapping[str, Any]:
    """Return a read-only copy of a mapping from names to `kind`."""
    if not isinstance(mapping, Mapping):
        raise PlanError(f"{what} is a {type(mapping).__name__}; it must map module names to {kind.__name__}")
    for name, value in mapping.items():
        if not isinstance(name, str) or not isinstance(value, kind):
            raise PlanError(f"{what}: {name!r} maps to a {type(value).__name__}; it must map names to {kind.__name__}")
    return MappingProxyType(dict(mapping))


def parsed(what: str, data: object, parse: Callable[[object], Value]) -> dict[str, Value]:
    """Return a JSON object with each entry parsed; errors name the entry."""
    if not isinstance(data, dict):
        raise PlanError(f"{what} is not a JSON object; it must map module names to what is pruned there")
    values = {}
    for name, entry in data.items():
        try:
            values[name] = parse(entry)
        except PlanError as error:
            raise PlanError(f"{name}: {error}") from error
    return values


def fields_of(data: object, *names: str) -> dict[str, Any]:
    """Return a JSON object that has these fields and no other."""
    if not isinstance(data, dict):
        raise PlanError(f"expected a JSON object with the fields {', '.join(names)}, found {type(data).__name__}")
    for name in names:
        if name not in data:
            raise PlanError(f"the field {name!r} is missing; expected {', '.join(names)}")
    for name in data:
        if name not in names:
            raise PlanError(f"the field {name!r} is unknown; expected {', '.join(names)}")
    return data
