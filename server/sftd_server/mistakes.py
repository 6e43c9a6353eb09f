"""Mistakes in a request, in the words and field names of the person who made it.

Turns pydantic's errors into lines of the form `field: what is wrong, what to do`.
"""

import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

MAX_MISTAKES = 50  # told in one answer
MAX_NAME_CHARS = 64  # shown of a field's name; no field of ours has a longer one

_PLACES = {"body", "query", "path", "header", "cookie", "form"}
_TYPE_MESSAGES = {
    "missing": "is required; give it",
    "string_type": "must be a string",
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "int_parsing": "must be an integer",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be a JSON object, sent with Content-Type: application/json",
    "finite_number": "must be a finite number",
    "string_pattern_mismatch": "holds a character that is not allowed here",
}


@dataclass(frozen=True)
class Mistake:
    """One mistake. `field` is the dotted name as the user wrote it."""

    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.field}: {self.message}"


def mistakes_of(errors: Sequence[Mapping[str, Any]], model: type[BaseModel] | None = None) -> list[Mistake]:
    """Pydantic's errors as mistakes, one a field. `model` lets an unknown field name its nearest neighbour."""
    mistakes: dict[str, Mistake] = {}
    for error in errors[:MAX_MISTAKES]:
        field = _field_name(error["loc"])
        mistakes.setdefault(field, Mistake(field, _message(error, model)))
    if len(errors) > MAX_MISTAKES:
        mistakes["…"] = Mistake("…", f"and {len(errors) - MAX_MISTAKES} more")
    return list(mistakes.values())


def _field_name(loc: Sequence[str | int]) -> str:
    parts = list(loc)
    if parts and parts[0] in _PLACES:
        parts = parts[1:]
    name = ""
    for part in parts:
        if isinstance(part, int):
            name += f"[{part}]"
        elif part not in ("[key]", "list[constrained-str]") and not part.startswith(("literal[", "list[")):
            name += f".{_printable(part)}" if name else _printable(part)
    return name or "body"


def _message(error: Mapping[str, Any], model: type[BaseModel] | None) -> str:
    kind, said = str(error["type"]), str(error["msg"])
    if kind == "extra_forbidden":
        return _unknown_field(error["loc"], model)
    if kind in _TYPE_MESSAGES:
        message = _TYPE_MESSAGES[kind]
    elif said.startswith("Input should "):
        message = "must " + said.removeprefix("Input should ")
    elif kind == "value_error":
        return said.removeprefix("Value error, ")
    elif " should have " in said:
        message = "must have " + said.split(" should have ", 1)[1]
    else:
        return said
    given = error.get("input")
    if kind != "missing" and (given is None or isinstance(given, str | int | float)):
        message += f", not {_short(given)}"
    return message


def _unknown_field(loc: Sequence[str | int], model: type[BaseModel] | None) -> str:
    holder = model
    for part in loc[1:-1] if loc[0] in _PLACES else loc[:-1]:
        holder = _submodel(holder, part) if holder else None
    known = list(holder.model_fields) if holder else []
    name = str(loc[-1])
    near = difflib.get_close_matches(name, known, n=1) if len(name) <= MAX_NAME_CHARS else []
    if near:
        return f"unknown field; did you mean {near[0]}?"
    return f"unknown field; the fields are {', '.join(known)}" if known else "unknown field; leave it out"


def _submodel(model: type[BaseModel], field: str | int) -> type[BaseModel] | None:
    info = model.model_fields.get(str(field))
    return _model_in(info.annotation) if info else None


def _model_in(annotation: Any) -> type[BaseModel] | None:  # any type expression
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next((found for part in typing.get_args(annotation) if (found := _model_in(part))), None)
    return None


def _short(value: str | int | float | None) -> str:
    names = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return names[value]
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _printable(text: str) -> str:
    """A field name that is safe in one line of a message."""
    shown = "".join(char if char.isprintable() else "�" for char in text[: MAX_NAME_CHARS + 1])
    return shown if len(shown) <= MAX_NAME_CHARS else f"{shown[: MAX_NAME_CHARS - 1]}…"
