"""Sweeps: every combination of a few values of a few drawing options."""

from dataclasses import fields, replace
from itertools import product
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from diffusers_ext.evaluation.drawing import DrawingOptions, check_options


Options = TypeVar("Options", bound=DrawingOptions)
SEPARATOR = ":"  # between the parts of one value, since a comma parts the values


def sweep_points(options: Options, sweep: tuple[str, ...]) -> list[tuple[dict[str, Any], Options]]:
    """All points of a sweep: what was varied, and the options of the point.

    Args:
        options: of every point, apart from what is varied.
        sweep: `name=value,value,...` for each varied field of [`DrawingOptions`]; a value of several parts is written
            with colons, as in `guidance_interval=0:1,0.2:0.8`, and None as `None`. Empty: one point.

    Raises:
        ValueError: for a name that is no such field, a value that does not fit it, and a field named twice.
    """
    known = {field.name: get_type_hints(DrawingOptions)[field.name] for field in fields(DrawingOptions)}
    del known["model"]
    varied: dict[str, list[Any]] = {}
    for part in sweep:
        name, equals, values = part.partition("=")
        if name not in known or not equals:
            raise ValueError(f"`sweep` holds {part!r}; write name=value,value with a name out of {', '.join(known)}.")
        if name in varied:
            raise ValueError(f"`sweep` varies {name!r} twice; give all its values at once, with commas.")
        varied[name] = list(dict.fromkeys(_read(name, value.strip(), known[name]) for value in values.split(",")))
    points = []
    for values in product(*varied.values()):
        settings = dict(zip(varied, values))
        point = replace(options, **settings)
        check_options(point)
        points.append((settings, point))
    return points


def point_name(settings: dict[str, Any]) -> str:
    """`guidance_scale=2,scheduler=ddim`: for tables and for the name of a folder."""
    return ",".join(f"{name}={value_name(value)}" for name, value in settings.items())


def value_name(value: Any) -> str:
    """An option's value as it is typed."""
    if isinstance(value, tuple | list):
        return SEPARATOR.join(map(value_name, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _read(name: str, text: str, kind: Any) -> Any:
    choices = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    if NoneType in choices and text == "None":
        return None
    kind = next(choice for choice in choices if choice is not NoneType)
    parts = get_args(kind)
    try:
        if get_origin(kind) is Literal:
            if text not in parts:
                raise ValueError(f"it must be one of {', '.join(parts)}")
            return text
        if get_origin(kind) is tuple:
            given = text.split(SEPARATOR)
            kinds = [parts[0]] * len(given) if parts[-1] is Ellipsis else parts
            if len(kinds) != len(given):
                raise ValueError(f"it must be {len(kinds)} numbers with a colon between them")
            return tuple(one(part) for one, part in zip(kinds, given))
        if text == "":
            raise ValueError("it is empty")
        return kind(text)
    except ValueError as error:
        raise ValueError(f"`sweep` gives {name} the value {text!r}, which does not fit: {error}.") from error
