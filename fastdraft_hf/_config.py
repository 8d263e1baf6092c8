"""Sections of a recipe: pydantic models whose errors are one line with the key's path."""

import math
import re
import types
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Annotated, Any, ClassVar, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError
from typing_extensions import Self

from fastdraft_hf._errors import FastDraftError, nearest

_COUNT = re.compile(r"^(\d+(?:\.\d+)?)\s*([kMBT]?)$")
_FACTOR = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_count(value: str) -> int:
    """Read a count with an optional unit: ``"50M"`` is 50,000,000, ``"200k"`` is 200,000.

    Raises:
        ValueError: ``value`` is not a whole number.
    """
    match = _COUNT.match(value.replace("_", "").replace(",", "").strip())
    if match is None:
        raise ValueError(f"'{value}' is not a count")
    # Decimal keeps 1.001M whole and every digit of a large count.
    number = Decimal(match.group(1)) * _FACTOR[match.group(2)]
    if number != int(number):
        raise ValueError(f"'{value}' is not a whole count")
    return int(number)


def _count(value: Any) -> Any:
    try:
        if not isinstance(value, bool):
            count = parse_count(value) if isinstance(value, str) else value
            if not (isinstance(count, int) and abs(count) >> 63):
                return count
    except ValueError:
        pass
    raise PydanticCustomError("count", "expected a whole number")


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("float", "expected a number")
    return value


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise PydanticCustomError("not_finite", "expected a finite number")
    return value


Count = Annotated[
    int,
    BeforeValidator(_count),
    WithJsonSchema({"anyOf": [{"type": "integer"}, {"type": "string", "pattern": _COUNT.pattern}]}),
]
"""A whole number that may be written ``50M``, ``1.5k`` or ``1_000``."""

Positive = Annotated[Count, Field(ge=1)]
"""A `Count` of at least 1."""

Number = Annotated[float, BeforeValidator(_number), AfterValidator(_finite)]
"""A float. ``1e-3``, which YAML reads as text, is accepted; true, NaN and infinity are not."""

Key = Annotated[str, BeforeValidator(str)]
"""A key of a mapping. YAML reads ``2:`` as a number."""


def _without_empty(entries: Any) -> Any:
    if isinstance(entries, Mapping):
        return {key: entry for key, entry in entries.items() if entry is not None}
    return entries


WithoutEmpty = BeforeValidator(_without_empty)
"""Of a mapping by name: an empty entry, as of ``generate.sets.chat=null``, is none."""


class Section(BaseModel):
    """Base class of a recipe's sections.

    Subclasses declare fields with ``pydantic.Field(default, description=...)`` and override
    `check_values`. Every error, in Python too, is a `FastDraftError` of one line with the key's
    path: ``generate.sets.chat.rows: expected a whole number, got 'x'``.
    """

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    # Settings that decide where or how fast a stage runs, but not what it makes.
    RUNTIME_ONLY: ClassVar[tuple[str, ...]] = ()

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise FastDraftError(_line(type(self), data, error)) from None

    @model_validator(mode="before")
    @classmethod
    def _mapping(cls, data: Any) -> Any:
        if data is None:
            return {}  # `design:` with nothing below it
        if isinstance(data, Mapping):
            return {str(key): value for key, value in data.items()}
        return data

    @model_validator(mode="after")
    def _checked(self) -> Self:
        self.check_values()
        return self

    def check_values(self) -> None:
        """Raise `FastDraftError` for a bad value; the message begins with the field's name."""

    def deciding(self) -> dict[str, Any]:
        """Return the settings that decide what a stage makes, not where or how fast."""
        return self.model_dump(exclude={*self.RUNTIME_ONLY})


def _line(section: type[Section], data: Mapping[str, Any], error: ValidationError) -> str:
    """Return what is wrong with a section as one line; unknown keys come first."""
    errors = error.errors(include_url=False)
    found = min(errors, key=lambda one: one["type"] != "extra_forbidden")
    loc = found["loc"]
    fields = {field.alias or name: field for name, field in section.model_fields.items()}
    if found["type"] == "extra_forbidden":
        hint = nearest(str(loc[-1]), fields) or f"; valid: {', '.join(fields)}"
        return f"{_join(loc)}: unknown key{hint}"
    if found["type"] == "missing":
        about = fields[str(loc[0])].description
        return f"{_join(loc)}: missing, and it has no default ({about})"
    options = _options(fields[str(loc[0])].annotation) if loc else []
    if len(options) > 1:  # pydantic names every option; report only the one that was meant
        value = data[str(loc[0])]
        try:
            TypeAdapter(_meant(options, value)).validate_python(value)
        except ValidationError as meant:
            found = meant.errors(include_url=False)[0]
            loc = (loc[0], *found["loc"])
    where, cause = _join(loc), found.get("ctx", {}).get("error")
    if isinstance(cause, FastDraftError):  # of a section below, which begins with its own key
        return f"{where}.{cause}" if where else str(cause)
    value, kind = _show(found["input"]), found["type"]
    if kind == "literal_error":
        valid = re.findall(r"'([^']*)'", found["ctx"]["expected"])
        hint = nearest(str(found["input"]), valid)
        return f"{where}: {value} is not one of {', '.join(valid)}{hint}"
    if kind in _BOUNDS:
        word, key = _BOUNDS[kind]
        return f"{where}: must be {word} {found['ctx'][key]:g}, got {value}"
    expected = _EXPECTED.get(kind) or _EXPECTED.get(kind.split("_")[0])
    what = f"expected {expected}" if expected else found["msg"].removeprefix("Value error, ")
    return f"{where or 'the recipe'}: {what}, got {value}"


def _options(kind: Any) -> list[Any]:
    if get_origin(kind) in (Union, types.UnionType):
        return [option for option in get_args(kind) if option is not type(None)]
    return [kind]


def _meant(options: list[Any], value: Any) -> Any:
    """Return the option of a union that a value of this type was meant for."""
    wanted = dict if isinstance(value, Mapping) else list if isinstance(value, list) else None
    return next((one for one in options if wanted and get_origin(one) is wanted), options[-1])


_BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("above", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("below", "lt"),
}
_EXPECTED = {
    "int": "a whole number",
    "count": "a whole number",
    "finite": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a text",
    "list": "a list",
    "too_short": "at least one entry",
    "dict": "a mapping of keys",
    "model": "a mapping of keys",
}


def _join(loc: Iterable[str | int]) -> str:
    path = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in loc)
    return path.removeprefix(".")


def _show(value: Any) -> str:
    huge = isinstance(value, int) and abs(value) >> 64  # Python does not print what is longer
    text = hex(value) if huge else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
