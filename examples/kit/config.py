"""A dataclass as configuration: on the command line, in JSON, and saved beside what was trained with it.

Fields are made by `option`. Values come from the dataclass, then from a preset, then from --config FILE, then from the
command line. An unknown key or a value of another type is an error that names it.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def option(default: Any, help: str, *, choices: Sequence[str] = (), may_change: bool = False) -> Any:
    """A field. may_change: a run may be resumed with another value. Ranges are checked in __post_init__."""
    metadata = {"help": help, "choices": choices, "may_change": may_change}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class _Kind:
    """Of a field: the type of an element, whether there are many, and whether None is allowed."""

    element: type
    many: bool
    optional: bool


def _kinds(cls: type) -> dict[str, _Kind]:
    kinds = {}
    for name, hint in typing.get_type_hints(cls).items():
        arguments = typing.get_args(hint)
        optional = isinstance(hint, types.UnionType) and type(None) in arguments
        if optional:
            hint = next(a for a in arguments if a is not type(None))
        many = typing.get_origin(hint) is tuple
        kinds[name] = _Kind(typing.get_args(hint)[0] if many else hint, many, optional)
    return kinds


def _checked(source: str, name: str, value: Any, kind: _Kind, choices: Sequence[str]) -> Any:
    """A value from JSON in its field's type; ints serve for floats."""

    def one(value: Any) -> Any:
        if kind.element is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if not isinstance(value, kind.element) or (isinstance(value, bool) and kind.element is not bool):
            raise ValueError(f"{source}: {name}: expected {kind.element.__name__}, got {json.dumps(value)}")
        if choices and value not in choices:
            raise ValueError(f"{source}: {name}: expected one of {', '.join(choices)}, got {value}")
        return value

    if value is None and kind.optional:
        return None
    if not kind.many:
        return one(value)
    if not isinstance(value, list):
        raise ValueError(f"{source}: {name}: expected a list, got {json.dumps(value)}")
    return tuple(map(one, value))


def from_json(cls: type[T], path: Path) -> dict[str, Any]:
    """The values in a JSON file, checked."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: no JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected an object of options, got {type(values).__name__}")
    fields, kinds = {f.name: f for f in dataclasses.fields(cls)}, _kinds(cls)  # type: ignore[arg-type]
    for name in values:
        if name not in fields:
            close = difflib.get_close_matches(name, fields, 1)
            raise ValueError(f"{path}: unknown option {name!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
    return {n: _checked(str(path), n, v, kinds[n], fields[n].metadata["choices"]) for n, v in values.items()}


def parse(
    cls: type[T],
    argv: Sequence[str] | None,
    *,
    description: str,
    epilog: str,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
) -> T:
    """The configuration of a command line. presets: values that a boolean option of that name stands for.

    Ends the process with status 2 and a message for what is wrong, as argparse does.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="JSON with options, such as a run's config.json")
    kinds = _kinds(cls)
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        kind, flag = kinds[f.name], "--" + f.name.replace("_", "-")
        default = None if f.default is MISSING else f.default
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
        text = f.metadata["help"] + (f" ({shown})" if shown not in (None, "", False) else "")
        common: dict[str, Any] = {"dest": f.name, "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
        if kind.element is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **common)
        else:
            common |= {"nargs": "+"} if kind.many else {}
            common |= {"choices": f.metadata["choices"]} if f.metadata["choices"] else {"metavar": f.name.upper()}
            parser.add_argument(flag, type=kind.element, **common)
    given = vars(parser.parse_args(argv))
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    path = given.pop("config", None)
    try:
        stored = from_json(cls, path) if path is not None else {}
        chosen = stored | given
        preset = {n: v for key, values in (presets or {}).items() if chosen.get(key) for n, v in values.items()}
        return cls(**(preset | chosen))
    except (ValueError, OSError) as error:
        parser.error(str(error))


def to_json(config: Any) -> str:
    return json.dumps(dataclasses.asdict(config), indent=1, ensure_ascii=False) + "\n"


def differences(config: Any, stored: Mapping[str, Any]) -> list[str]:
    """Options, other than those that may change, whose stored value is another: "name: stored, now ..."."""
    now = json.loads(to_json(config))
    fixed = [f.name for f in dataclasses.fields(config) if not f.metadata["may_change"]]
    return [f"{n}: {stored.get(n)!r}, now {now[n]!r}" for n in fixed if stored.get(n) != now[n]]
