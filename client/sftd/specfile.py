"""Job specs as YAML files: read, changed by `--set`, and with local data files uploaded.

YAML 1.2 in its core form: `2e-5` is a number and `no` is a word, which PyYAML reads the other way round. Aliases and
tags are refused: a spec is data, and a small file must not grow large in memory.
"""

import re
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import yaml

from sftd.errors import ConfigurationError

MAX_SPEC_BYTES = 1024 * 1024
FILE_FIELDS = ("training_file", "validation_file")
Spec = dict[str, Any]  # as written; the server checks it


def read_spec(path: Path) -> Spec:
    """The spec in a YAML (or JSON) file."""
    try:
        if path.stat().st_size > MAX_SPEC_BYTES:
            raise ConfigurationError(f"{path} is larger than {MAX_SPEC_BYTES:,} bytes; a spec is not.")
        value = read_yaml(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not UTF-8 text.") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigurationError(f"{path}: {_one_line(error)}") from error
    if not isinstance(value, dict):
        raise ConfigurationError(
            f"{path} is not a spec: it must be a mapping of fields, such as `base_model: org/name`."
        )
    return value


def read_yaml(text: str) -> Any:  # any YAML value
    """A YAML document by the rules of this file. Raises yaml.YAMLError."""
    return yaml.load(text, Loader=_SpecLoader)  # a SafeLoader with fewer rules


def set_field(spec: Spec, assignment: str) -> None:
    """Carry out one `--set`: `learning_rate=2e-5`, `lora.rank=8`, `metadata.team=q`."""
    name, equals, text = assignment.partition("=")
    parts = name.strip().split(".")
    if not equals or not all(parts):
        raise ConfigurationError(f"--set {assignment!r} is not name=value, such as learning_rate=2e-5.")
    try:
        value = read_yaml(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigurationError(f"--set {assignment!r}: {_one_line(error)}") from error
    place = spec
    for part in parts[:-1]:
        if place.get(part) is None:
            place[part] = {}
        place = place[part]
        if not isinstance(place, dict):
            raise ConfigurationError(f"--set {assignment!r}: {part} has no fields.")
    keep = value is None or isinstance(value, str) or not _is_text(parts)
    place[parts[-1]] = value if keep else text


def _is_text(parts: list[str]) -> bool:
    """Does the spec hold text here? A commit of digits alone, or a name like 1e5, must not become a number."""
    if len(parts) == 2:
        return parts[0] == "metadata" or (parts[0] == "wandb" and parts[1] != "tags")
    return parts[0] in ("name", "base_model", *FILE_FIELDS)


def upload_files(spec: Spec, *, folder: Path, upload: Callable[[Path], str]) -> None:
    """Replace data files that lie here, beside the spec or in the working folder, by the ids of their uploads."""
    for field in FILE_FIELDS:
        name = spec.get(field)
        if not isinstance(name, str) or not name:
            continue
        path = next((place for place in (folder / name, Path(name)) if place.is_file()), None)
        if path is not None:
            spec[field] = upload(path)
        elif "/" in name or "." in name:  # no id looks like this
            raise ConfigurationError(f"{field}: {name} is neither a file here nor the id of an uploaded one.")


class _SpecLoader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  # PyYAML's own form

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]  # PyYAML has no types here
            raise yaml.MarkedYAMLError(
                problem="aliases (*name) are not allowed here", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        mapping = super().construct_mapping(node, deep=True)
        if len(mapping) < len(node.value):
            names = [key.value for key, _ in node.value]
            twice = next((name for name in names if names.count(name) > 1), "a field")
            raise yaml.MarkedYAMLError(problem=f"{twice} stands here twice", problem_mark=node.start_mark)
        return mapping


_SpecLoader.add_implicit_resolver(
    "tag:yaml.org,2002:null", re.compile(r"^(~|null|Null|NULL|)$"), ["~", "n", "N", ""]
)
_SpecLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_SpecLoader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_SpecLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)
_SpecLoader.add_constructor(
    "tag:yaml.org,2002:int", lambda loader, node: int(node.value)
)  # 010 is ten, not eight


def _one_line(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}."
    return "it is nested too deeply." if isinstance(error, RecursionError) else " ".join(str(error).split())
