# SPDX-License-Identifier: Apache-2.0
"""How a section of the pool file is declared, and how it is read.

    @dataclass(frozen=True, slots=True)
    class Tea(Section):
        brew_s: Annotated[Seconds, above(0, "must be above 0, such as 3m")] = 180.0

The type says how the key `brew` is written, its rules what it must be, and a docstring below it what it means. The
reader below, the chart's schema, docs/configuration.md and the flags of `tokenpool serve` all come from that one
declaration. What is made in Python is checked by the same rules. pydantic is imported when a section is read or told.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar, get_args, get_type_hints

from tokenpool import units
from tokenpool.errors import ConfigError, check_setting, show

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

_UNIT_SUFFIX = re.compile(r"_(s|bytes)$")

_T = TypeVar("_T")


def _once(make: Callable[[type[Any]], _T]) -> Callable[[type[Any]], _T]:
    """Make something of each class once."""
    return cache(make)  # type: ignore[return-value]  # mypy takes no class for hashable


@dataclass(frozen=True, eq=False)
class Written:
    """How a pool file writes a value that Python holds otherwise, or that only some texts and numbers are good for."""

    parse: Callable[..., Any]
    """Makes the value of what YAML holds; raises ConfigError. With `in_folder` it gets the pool file's folder too."""
    form: str
    """What stands in the file, in a few words: `size`, `time`, `text`."""
    schema: Mapping[str, Any] | None = None
    """JSON schema of what stands in the file; None = that of the Python type."""
    show: Callable[[Any], str] = str
    """Writes a value as the file does."""
    auto: bool = False
    """Whether None is written `auto`; else the key is left out."""
    in_folder: bool = False

    def read(self, value: object, folder: str = "") -> Any:
        """The value of what YAML holds; raises ConfigError."""
        if self.auto and value in (None, "auto"):
            return None
        return self.parse(value, folder) if self.in_folder else self.parse(value)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Let pydantic read the key with `read`, and describe it by `schema`."""
        from pydantic_core import core_schema

        def describe(core: Any, handler: Any) -> Any:
            found = handler(core) if self.schema is None else dict(self.schema)
            return {"anyOf": [{"enum": ["auto", None]}, found]} if self.auto else found

        return core_schema.with_info_before_validator_function(
            lambda value, info: self.read(value, info.context),
            handler(source),
            metadata={"pydantic_js_functions": [describe]},
        )


@dataclass(frozen=True, eq=False)
class Rule:
    """What a value other than None must be; checked whenever its section is made, from a file or in Python."""

    holds: Callable[[Any], object]
    problem: str
    """What is wrong and how to fix it; {} stands for the value."""
    schema: Mapping[str, Any]
    """What it adds to the key's JSON schema."""

    def __get_pydantic_json_schema__(self, core: Any, handler: Any) -> Any:
        """Add `schema` to that of the type."""
        return {**handler(core), **self.schema}


def at_least(least: float, problem: str | None = None) -> Rule:
    """A number must not be below `least`."""
    return Rule(lambda value: value >= least, problem or f"must be {least} or more", {"minimum": least})


def above(limit: float, problem: str) -> Rule:
    """A number must be above `limit`."""
    return Rule(lambda value: value > limit, problem, {"exclusiveMinimum": limit})


def between(least: float, most: float, problem: str | None = None) -> Rule:
    """A number must not be below `least` or above `most`."""
    problem = problem or f"{{}} is out of range: give {least} to {most}"
    return Rule(lambda value: least <= value <= most, problem, {"minimum": least, "maximum": most})


def one_of(*values: str) -> Rule:
    """A text must be one of `values`."""
    return Rule(values.__contains__, f"must be one of {', '.join(values)}, got {{}}", {"enum": list(values)})


def matching(pattern: str, problem: str) -> Rule:
    """A text must match all of `pattern`."""
    return Rule(re.compile(pattern).fullmatch, problem, {"pattern": f"^{pattern}$"})


def filled(problem: str) -> Rule:
    """A list must hold something."""
    return Rule(bool, problem, {"minItems": 1})


@dataclass(frozen=True, eq=False)
class ChangesOf:
    """The field holds the keys of another section that are given, with their values; YAML: a mapping of them."""

    section: type[Section]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Read and describe it as the section itself."""
        from pydantic_core import core_schema

        def read(value: Any, inner: Callable[[Any], Any]) -> tuple[tuple[str, Any], ...]:
            checked = inner(value)
            return tuple((key, getattr(checked, key)) for key in value)

        return core_schema.no_info_wrap_validator_function(read, handler.generate_schema(self.section))


def _only(kind: type, what: str) -> Callable[[object], object]:
    """A reader that takes values of one type as they are; True is no number."""

    def read(value: object) -> object:
        good = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        check_setting(good, None, f"expected {what}, got {show(value)}")
        return value

    return read


def list_of(what: str) -> Written:
    """A list of `what`, whose items pydantic reads."""
    return Written(_only(list, f"a list of {what}"), "list")


SIZE = {"type": ["string", "integer"], "pattern": r"^[0-9]+(\.[0-9]+)? *([kKmMgGtT]([iI][bB]?|[bB])|[bB])?$"}
TIME = {"type": ["string", "number"], "pattern": r"^[0-9]+(\.[0-9]+)? *([uU][sS]|[mM][sS]|[sSmMhH])?$"}

Bytes = Annotated[int, Written(units.parse_bytes, "size", SIZE, units.format_bytes)]
"""A number of bytes, written as such or with a unit: `24GiB`."""
BytesOrAuto = Annotated[int | None, Written(units.parse_bytes, "size", SIZE, units.format_bytes, auto=True)]
Seconds = Annotated[float, Written(units.parse_seconds, "time", TIME, units.format_seconds)]
"""Seconds, written as such or with a unit: `400ms`."""
_read_count = _only(int, "a whole number")
Count = Annotated[int, Written(_read_count, "whole number")]
Number = Annotated[float, Written(units.parse_number, "number", show=lambda value: f"{value:g}")]
Switch = Annotated[bool, Written(_only(bool, "true or false"), "true or false", show=lambda value: str(value).lower())]
Text = Annotated[str, Written(units.parse_text, "text")]
ExpandedText = Annotated[str, Written(lambda value: units.expand_env(units.parse_text(value)), "text")]
"""A text in which `${NAME}` is replaced from the environment."""


def key_of(name: str) -> str:
    """The key of a field: its name without the unit."""
    return _UNIT_SUFFIX.sub("", name)


class Section:
    """A mapping of the pool file. Make it in Python by its fields, whose values hold bytes and seconds."""

    __slots__ = ()
    __pydantic_config__: ClassVar[dict[str, Any]] = {
        "extra": "forbid",
        "alias_generator": key_of,
        "use_attribute_docstrings": True,
    }

    def __post_init__(self) -> None:
        """Raise ConfigError for the first field that breaks a rule.

        A section with checks of its own calls this by name: `super()` does not work in a class with slots.
        """
        for name, rule in _rules_of(type(self)):
            value = getattr(self, name)
            if value is not None and not rule.holds(value):
                raise ConfigError(rule.problem.replace("{}", show(value)), key=key_of(name))

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """Refuse unknown keys in our words before pydantic reads the others."""
        from pydantic_core import core_schema

        schema = handler(source)
        schema["schema"] = core_schema.no_info_before_validator_function(cls._check_keys, schema["schema"])
        return schema

    @classmethod
    def _check_keys(cls, data: object) -> object:
        known = keys_of(cls)
        if not isinstance(data, dict):
            raise ConfigError(f"expected a mapping with the keys {', '.join(known)}, got {show(data)}")
        for key in data:
            if key not in known:
                near = difflib.get_close_matches(key, known, 1) if isinstance(key, str) else []
                hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
                raise ConfigError(f"unknown key {show(key)}, {hint}")
        return data


@dataclass(frozen=True, slots=True)
class Key:
    """A key of a section, for who describes it."""

    name: str
    """The field that holds it."""
    written: Written
    """How it is written; a section of its own has no other form than `mapping`."""
    choices: Sequence[str]
    """The texts that it may be; empty = any."""
    default: Any
    """What the field holds where the key is left out; `dataclasses.MISSING` = the key is required."""

    @property
    def default_text(self) -> str | None:
        """The default as the file would say it; None = no text says it."""
        if self.default is None and self.written.auto:
            return "auto"
        said = self.default not in (None, (), MISSING) and not isinstance(self.default, Section)
        return self.written.show(self.default) if said else None


_MAPPING = Written(_only(dict, "a mapping"), "mapping")


@_once
def keys_of(cls: type[Any]) -> Mapping[str, Key]:
    """The keys of a section, in the order of its fields."""
    marks = {name: [*_marks(hint)] for name, hint in get_type_hints(cls, include_extras=True).items()}

    def key(name: str, default: object) -> Key:
        written = next((mark for mark in marks[name] if isinstance(mark, Written)), _MAPPING)
        enums = (mark.schema["enum"] for mark in marks[name] if isinstance(mark, Rule) and "enum" in mark.schema)
        return Key(name, written, next(enums, ()), default)

    return {key_of(field.name): key(field.name, field.default) for field in fields(cls)}


@_once
def _rules_of(cls: type[Any]) -> Sequence[tuple[str, Rule]]:
    hints = get_type_hints(cls, include_extras=True)
    return [(name, mark) for name, hint in hints.items() for mark in _marks(hint) if isinstance(mark, Rule)]


def _marks(hint: Any) -> Iterator[object]:
    """What an annotation says beside types, that of the members of a union included."""
    for part in get_args(hint):
        if isinstance(part, Written | Rule):
            yield part
        else:
            yield from _marks(part)


@_once
def adapter_of(cls: type[Any]) -> TypeAdapter[Any]:
    """pydantic's reader of a section."""
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


@_once
def texts_of(cls: type[Any]) -> dict[str, str]:
    """The docstring below each field, on one line, by key; raises KeyError for a field without one."""
    schema = adapter_of(cls).json_schema()
    return {key: " ".join(schema["properties"][key]["description"].split()) for key in keys_of(cls)}


def read_section(cls: type[_T], data: object, folder: str) -> _T:
    """Make a `cls` of what YAML holds; relative paths start at `folder`. Raises ConfigError with the key's path."""
    from pydantic import ValidationError

    try:
        return adapter_of(cls).validate_python(data, context=folder)
    except ValidationError as error:
        raise _first_of(error) from None


def _first_of(error: ValidationError) -> ConfigError:
    first = error.errors(include_url=False)[0]
    refusal = first.get("ctx", {}).get("error")
    if not isinstance(refusal, ConfigError):
        refusal = ConfigError("is missing: add it" if first["type"] == "missing" else first["msg"])
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
    return refusal.under(path.removeprefix(".") or None)
