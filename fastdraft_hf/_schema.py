"""Dataclasses read from YAML: strict, with one clear line when something is wrong.

A recipe section is a dataclass whose fields carry ``metadata={"help": ...}`` as TRL's configs do.
`load` turns a mapping into the dataclass and names the key's path on any error; `json_schema`
prints the same structure so that editors complete it. Only the types that sections use are
understood: bool, int, float, str, ``Literal``, ``X | None``, ``list[T]``, ``dict[str, T]`` and
dataclasses.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fastdraft_hf._errors import FastDraftError, nearest

T = TypeVar("T")

_COUNT = re.compile(r"^(\d+(?:\.\d+)?)\s*([kMBT]?)$")
_FACTOR = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def setting(default: Any, help: str, **metadata: Any) -> Any:
    """Declare a field with its help text. Mutable defaults are copied for every instance."""
    metadata = {"help": help, **metadata}
    if isinstance(default, (list, dict)):
        kind = type(default)
        return dataclasses.field(default_factory=lambda: kind(default), metadata=metadata)
    if isinstance(default, type) or callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def parse_count(value: str) -> int:
    """Read a count as people write it: ``"50M"`` is 50,000,000, ``"200k"`` is 200,000.

    Raises:
        ValueError: ``value`` is not a count, or not a whole one.
    """
    match = _COUNT.match(value.replace("_", "").replace(",", "").strip())
    if match is None:
        raise ValueError(f"'{value}' is no count")
    # Decimal: 1.001M is whole, and a count of twenty digits keeps its last one.
    number = Decimal(match.group(1)) * _FACTOR[match.group(2)]
    if number != int(number):
        raise ValueError(f"'{value}' is no whole count")
    return int(number)


def load(cls: type[T], data: Any, path: str = "") -> T:
    """Build dataclass ``cls`` from a mapping.

    Args:
        cls: the dataclass.
        data: what YAML gave; ``None`` stands for an empty mapping.
        path: the key path of this mapping, for error messages (``"pretrain"``).

    Raises:
        FastDraftError: an unknown key, a missing one, or a value of the wrong type.
    """
    where = path or "the recipe"
    if data is None:
        data = {}
    if not isinstance(data, Mapping):
        raise FastDraftError(f"{where}: expected a mapping of keys, got {_show(data)}")
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            full = f"{path}.{key}" if path else str(key)
            hint = nearest(str(key), fields) or f"; valid: {', '.join(fields)}"
            raise FastDraftError(f"{full}: unknown key{hint}")
    hints = get_type_hints(cls)
    values = {}
    for name, field in fields.items():
        full = f"{path}.{name}" if path else name
        if name in data:
            values[name] = _convert(hints[name], data[name], full)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise FastDraftError(f"{full}: missing, and it has no default ({_help(field)})")
    try:
        return cls(**values)
    except FastDraftError as error:  # a section's own checks say the field, not its path
        raise FastDraftError(f"{path}.{error}" if path else str(error)) from None


def _convert(kind: Any, value: Any, path: str) -> Any:
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, path)
    if origin is Literal:
        if value in args and type(value) in {type(a) for a in args}:
            return value
        hint = nearest(str(value), map(str, args))
        raise FastDraftError(
            f"{path}: {_show(value)} is not one of {', '.join(map(str, args))}{hint}"
        )
    if origin is list:
        if not isinstance(value, (list, tuple)):
            raise FastDraftError(f"{path}: expected a list, got {_show(value)}")
        return [_convert(args[0], item, f"{path}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise FastDraftError(f"{path}: expected a mapping of keys, got {_show(value)}")
        return {str(k): _convert(args[1], v, f"{path}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(kind):
        return load(typing.cast(type, kind), value, path)
    return _convert_scalar(kind, value, path)


def _convert_union(args: tuple[Any, ...], value: Any, path: str) -> Any:
    if value is None:
        if type(None) in args:
            return None
        raise FastDraftError(f"{path}: must not be empty")
    errors: list[FastDraftError] = []
    for option in args:
        if option is type(None):
            continue
        try:
            return _convert(option, value, path)
        except FastDraftError as error:
            if get_origin(option) is dict and isinstance(value, Mapping):
                raise  # a mapping was meant; what is wrong inside is what helps
            if get_origin(option) is list and isinstance(value, (list, tuple)):
                raise
            errors.append(error)
    raise errors[-1]


def _convert_scalar(kind: type, value: Any, path: str) -> Any:
    wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
    bad = FastDraftError(f"{path}: expected {wanted.get(kind, kind)}, got {_show(value)}")
    if kind is bool:
        if isinstance(value, bool):
            return value
    elif kind is int:
        if isinstance(value, str):
            try:
                return parse_count(value)
            except ValueError:
                raise bad from None
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if isinstance(value, float) and value.is_integer():  # not infinity, not NaN
            return int(value)
    elif kind is float:
        if isinstance(value, str):  # YAML reads 1e-3 as a text
            try:
                return float(value)
            except ValueError:
                raise bad from None
        if not isinstance(value, bool) and isinstance(value, (int, float)):
            return float(value)
    elif kind is str and isinstance(value, str):
        return value
    raise bad


def dump(value: Any) -> Any:
    """Return the plain mapping a section was, or could have been, read from."""
    return dataclasses.asdict(value)


def json_schema(cls: type) -> dict[str, Any]:
    """Return a JSON schema (draft 2020-12) of dataclass ``cls``."""
    hints = get_type_hints(cls)
    properties, required = {}, []
    for field in dataclasses.fields(cls):
        schema = _schema_of(hints[field.name])
        schema["description"] = _help(field)
        if field.default is not dataclasses.MISSING:
            schema["default"] = field.default
        elif field.default_factory is dataclasses.MISSING:
            required.append(field.name)
        properties[field.name] = schema
    result: dict[str, Any] = {
        "type": "object",
        "additionalProperties": False,
        "properties": properties,
    }
    if required:
        result["required"] = required
    return result


def _schema_of(kind: Any) -> dict[str, Any]:
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return {}
    if origin in (Union, types.UnionType):
        options = [_schema_of(a) for a in args if a is not type(None)]
        if type(None) in args:
            options.append({"type": "null"})
        return {"anyOf": options}
    if origin is Literal:
        return {"enum": list(args)}
    if origin is list:
        return {"type": "array", "items": _schema_of(args[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema_of(args[1])}
    if dataclasses.is_dataclass(kind):
        return json_schema(typing.cast(type, kind))
    if kind is int:  # counts may be written 50M
        return {"anyOf": [{"type": "integer"}, {"type": "string", "pattern": _COUNT.pattern}]}
    return {"type": {bool: "boolean", float: "number", str: "string"}[kind]}


def _help(field: dataclasses.Field[Any]) -> str:
    return str(field.metadata.get("help", ""))


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
