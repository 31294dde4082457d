"""Values of a run's fields: plain words of a YAML file or the command line, and the types that the fields declare."""

import re
import types
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

from pertstate.base.messages import nearest


class Word(str):
    """A plain word of a file or the command line, without quotes: the type of its field says what it means."""


# What plain words look like: 1e-4 is a number; 010, 12:30, 1_000 and 2020-01-01 are text.
LOOKS = {
    "null": re.compile(r"~|null|Null|NULL|"),
    "bool": re.compile(r"(?i:true|false|yes|no|on|off)"),
    "int": re.compile(r"[-+]?(?:0|[1-9][0-9]*)"),
    "float": re.compile(
        r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf)|\.(?:nan|NaN)"
    ),
}

_MISFIT = object()
_SIMPLE = {type(None): type(None), bool: bool, int: int, float: int | float, str: str}


def looks_like(value):
    """The value that a word looks like; of a list or mapping, each of its parts. Anything else stays as it is."""
    if isinstance(value, list):
        return [looks_like(item) for item in value]
    if isinstance(value, dict):
        return {str(name): looks_like(item) for name, item in value.items()}
    if not isinstance(value, Word):
        return value
    kind = next((kind for kind, pattern in LOOKS.items() if pattern.fullmatch(value)), "text")
    match kind:
        case "null":
            return None
        case "bool":
            return value.lower() in ("true", "yes", "on")
        case "int":
            return int(value)
        case "float":
            return float(re.sub(r"\.(?=[iInN])", "", value))
    return str(value)


def as_declared(name: str, kind, value):
    """
    The value of a field as its type says. A word is what it looks like where the type allows that, and text otherwise:
    `no` is false for a `bool` and a name for a `str`. A whole number is a name where a name is expected; one value is a
    list of one where a list is expected.

    Args:
        name (`str`): of the field, for messages.
        kind (type): what the field declares. A type that is not one of those below takes any value.

            - `bool`, `int`, `float` (also takes an `int`), `str`, None, `Literal`, an `Enum`
            - `list[...]`, `dict[..., ...]` and unions of all these

    Raises:
        ValueError: the value does not fit; for a `Literal` the nearest option is said.
    """
    fitted = _fit(kind, value)
    if fitted is not _MISFIT:
        return fitted
    found = looks_like(value)
    choices = [option for one in _alternatives(kind) if get_origin(one) is Literal for option in get_args(one)]
    if choices and isinstance(found, str):
        options = f"expected one of {choices}" if len(_alternatives(kind)) == 1 else f"expected {type_name(kind)}"
        near = nearest(found, choices)
        raise ValueError(f"{name}={found!r} is not an option: {options}" + (f"; {near}" if near else ""))
    names = any(get_origin(one) is list or one in (list, str) for one in _alternatives(kind))
    raise ValueError(
        f"{name}: expected {type_name(kind)}, found {found!r}"
        + ("; put a name that looks like something else in quotes" if names else "")
    )


def type_name(kind) -> str:
    """A type in words: `int | list | None`, `'pad' | 'repeat'`."""
    names = []
    for one in _alternatives(kind):
        if get_origin(one) is Literal:
            names += [repr(option) for option in get_args(one)]
        elif isinstance(one, type) and issubclass(one, Enum):
            names += [repr(option.value) for option in one]
        else:
            origin = get_origin(one) or one
            names.append("None" if origin is type(None) else getattr(origin, "__name__", str(origin)))
    return " | ".join(dict.fromkeys(names))


def _alternatives(kind) -> tuple:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _fit(kind, value):
    """The value as a type has it, or `_MISFIT`."""
    alternatives = _alternatives(kind)
    looks = looks_like(value)
    readings = [value if isinstance(value, (list, dict)) else looks]
    if isinstance(value, Word) and looks is not None:
        readings.append(str(value))
    elif isinstance(value, int) and not isinstance(value, bool):
        readings.append(str(value))
    for reading in readings:
        for one in alternatives:
            fitted = _fit_one(one, reading)
            if fitted is not _MISFIT:
                return fitted
    # A number or truth value where numbers are allowed, too, is a mistake and no name.
    if looks is None or isinstance(value, (list, dict)) or ({int, float} & {*alternatives} and type(looks) is not str):
        return _MISFIT
    for one in alternatives:
        if (get_origin(one) or one) is list:
            item = _fit(_item_type(one), value)
            return _MISFIT if item is _MISFIT else [item]
    return _MISFIT


def _fit_one(kind, value):
    origin = get_origin(kind) or kind
    if origin is Literal:
        fits = isinstance(value, (str, bool)) and value in get_args(kind)
        return value if fits else _MISFIT
    if origin is list:
        if not isinstance(value, list):
            return _MISFIT
        items = [_fit(_item_type(kind), item) for item in value]
        return _MISFIT if _MISFIT in items else items
    if origin is dict:
        if not isinstance(value, dict):
            return _MISFIT
        items = {str(name): _fit(_item_type(kind), item) for name, item in value.items()}
        return _MISFIT if _MISFIT in items.values() else items
    if origin in _SIMPLE:
        fits = isinstance(value, _SIMPLE[origin]) and (origin is bool or not isinstance(value, bool))
        return value if fits else _MISFIT
    if isinstance(origin, type) and issubclass(origin, Enum):
        return value if value in [option.value for option in origin] else _MISFIT
    return looks_like(value)


def _item_type(kind):
    """Of a list or mapping: the last of its parameters."""
    return get_args(kind)[-1] if get_args(kind) else Any
