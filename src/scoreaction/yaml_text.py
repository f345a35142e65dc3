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

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        text = super().construct_scalar(node)
        if isinstance(text, str) and any("\ud800" <= letter <= "\udfff" for letter in text):
            try:  # JSON writes a letter beyond the first 65,536 as two
                return text.encode("utf-16", "surrogatepass").decode("utf-16")
            except UnicodeDecodeError as error:
                raise yaml.constructor.ConstructorError(
                    None, None, "half a letter (\\ud800 to \\udfff)", node.start_mark
                ) from error
        return text


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
        return _document(_Loader(text), where)  # which refuses control characters at once
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{where}{line}: not valid YAML: {error.problem}") from error
    except UserError:
        raise
    except yaml.reader.ReaderError as error:
        number = text[: error.position].count("\n") + 1
        raise UserError(f"{where} line {number}: not valid YAML: the control character {chr(error.character)!r}") from error
    except (yaml.YAMLError, RecursionError, TypeError) as error:  # the last for a list where a key should be
        raise UserError(f"{where}: not valid YAML") from error
    except (ValueError, OverflowError, AttributeError, LookupError) as error:  # of a date, or a number, that is none
        raise UserError(f"{where}: not valid YAML: {error}; put a text in quotes") from error


def _document(loader: _Loader, where: str) -> Any:
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _unfolded(node, {}) > MOST:
            raise UserError(f"{where}: its aliases unfold to more than {MOST:,} values; write them out")
        return loader.construct_document(node)
    finally:
        loader.dispose()


MOST = 1_000_000
"""Values that a file may unfold to."""


def _unfolded(node: yaml.Node, known: dict[int, int]) -> int:
    """The number of values of a node where each alias is written out; too many for one that holds itself."""
    if id(node) not in known:
        known[id(node)] = MOST + 1  # while it is counted: one that holds itself has no end
        inner = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for item in inner for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_unfolded(part, known) for part in parts)
    return known[id(node)]


def read_text(path: Path) -> str:
    """Reads a UTF-8 file, without its byte order mark; UserError with its path if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror or type(error).__name__}); name a file that can be"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start}); save it as UTF-8, or name another file") from error
