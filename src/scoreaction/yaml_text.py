"""Reading and writing of safe YAML, such that written values are read back unchanged."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from scoreaction.errors import UserError
from scoreaction.types import Values


class _Loader(yaml.SafeLoader):
    """Loader of safe YAML in which 1e-3 is a number and a repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Dumper that quotes a text which `_Loader` would read as a number."""


for kind in (_Loader, _Dumper):
    kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def dump_yaml(values: Values) -> str:
    """Writes plain values as YAML that `parse_yaml` reads back.

    >>> dump_yaml({"prompts": ["1e5", "a cat"]})
    "prompts: ['1e5', a cat]\\n"
    """
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110, allow_unicode=True)


def parse_yaml(text: str, *, where: str) -> Any:
    """Reads safe YAML; UserError with `where` and the line if it is not valid.

    >>> parse_yaml("1e-3", where="here")
    0.001
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{where}{line}: not valid YAML: {error.problem}") from error
    except (yaml.YAMLError, RecursionError, TypeError) as error:  # the last for a list where a key should be
        raise UserError(f"{where}: not valid YAML") from error


def read_text(path: Path) -> str:
    """Reads a UTF-8 file, without its byte order mark; UserError with its path if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({type(error).__name__})") from error
