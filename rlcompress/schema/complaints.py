"""What is wrong with an experiment's options, in words that say what to write instead."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from pydantic import BaseModel, JsonValue, ValidationError
from pydantic_core import ErrorDetails

from rlcompress.core.errors import did_you_mean

Loc = tuple[int | str, ...]


def show(value: object) -> str:
    """A value as it would be written, in 60 characters at most."""
    try:
        text = json.dumps(value, default=str)
    except (TypeError, ValueError):  # a key that is no text, or a mapping that holds itself
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _under(kind: Any, part: int | str) -> Any:
    """The type of what `part` names in a `kind`; None where that holds no parts of its own."""
    fields = getattr(kind, "model_fields", {})
    if part in fields:
        return fields[part].annotation
    inner = [each for each in get_args(kind) if each not in (..., NoneType)]
    if get_origin(kind) in (dict, tuple):
        return inner[-1]
    optional = get_origin(kind) is UnionType and len(inner) == 1
    return _under(inner[0], part) if optional else None


def _depth(model: type[BaseModel], loc: Loc) -> int:
    """How many parts of `loc` name options, keys or places in a list: those above a JSON value."""
    kind: Any = model
    for depth, part in enumerate(loc):
        kind = _under(kind, part)
        if kind is None or kind is JsonValue:
            return depth + 1
    return len(loc)


def _keys(model: type[BaseModel], loc: Loc) -> list[str]:
    """Names of the options at `loc`; none where it holds no options."""
    kind: Any = model
    for part in loc:
        kind = _under(kind, part)
    return list(getattr(kind, "model_fields", ()))


def _range(model: type[BaseModel], loc: Loc) -> str:
    """`, 1 or more`: what the number at `loc` may be; empty where it is no option, or anything."""
    kind: Any = model
    field = None
    for part in loc:
        fields = getattr(kind, "model_fields", {})
        if part not in fields:
            return ""
        field = fields[part]
        kind = field.annotation
    words = {"ge": "{} or more", "gt": "above {}", "le": "{} or less", "lt": "below {}"}
    bounds = [
        text.format(getattr(limit, name))
        for limit in (field.metadata if field else ())
        for name, text in words.items()
        if getattr(limit, name, None) is not None
    ]
    return f", {' and '.join(bounds)}" if bounds else ""


def _complaint(model: type[BaseModel], error: ErrorDetails) -> str:
    """What pydantic found, in words that say what to write instead."""
    kind, loc = error["type"], error["loc"]
    if kind == "extra_forbidden":
        allowed = _keys(model, loc[:-1])
        # The right word in the wrong section is nearer than a word that looks like it.
        paths = [f"{key}.{loc[-1]}" for key in allowed if loc[-1] in _keys(model, (key,))]
        near = f"; did you mean {' or '.join(paths)}?" if paths else did_you_mean(loc[-1], allowed)
        return f"no such key{near} (allowed: {', '.join(allowed)})"
    if kind == "literal_error":
        names = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        return f"must be one of {', '.join(names)}{did_you_mean(error['input'], names)}"
    if kind in ("model_type", "dict_type"):
        keys = _keys(model, loc)
        return "must be a mapping" + (f" (keys: {', '.join(keys)})" if keys else "")
    if kind in ("int_parsing", "int_type", "int_from_float"):
        return f"must be a whole number{_range(model, loc)}"
    if kind in ("float_parsing", "float_type"):
        return f"must be a number{_range(model, loc)}"
    plain = {
        "missing": "missing, and has no default",
        "tuple_type": "must be a list",
        "string_too_short": "must not be empty",
        "string_pattern_mismatch": "must be letters, digits, '.', '_' and '-'",
        "invalid-json-value": "must be numbers, text, true, false, null, lists or mappings",
    }
    message = plain.get(kind, error["msg"].removeprefix("Value error, "))
    return message.replace("Input should", "must", 1)


def problems(
    model: type[BaseModel], error: ValidationError, where: Callable[[Loc], str]
) -> list[str]:
    """A line a problem; `where` says in which file and experiment a key stands."""
    lines, details = [], error.errors(include_url=False)
    for detail in details:
        loc = detail["loc"]
        # A list whose items are all wrong is called too short besides.
        inside = (d["loc"] for d in details if len(d["loc"]) > len(loc))
        if detail["type"] == "too_short" and any(other[: len(loc)] == loc for other in inside):
            continue
        if detail["type"] == "invalid-json-value":
            loc = loc[: _depth(model, loc)]  # beyond it pydantic adds words of its own
        path = ".".join(str(part) for part in loc)
        value = "" if detail["type"] == "missing" else f" = {show(detail['input'])}"
        key = f"{path}{value}: " if path else ""
        lines.append(f"{where(loc)}{key}{_complaint(model, detail)}")
    return lines
