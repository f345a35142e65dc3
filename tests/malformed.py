"""Malformed recipes: the shipped ones with settings changed, moved, repeated or cut off, and files that are none at all."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

import yaml

from scoreaction import catalog


class Raw(str):
    """Text that goes into the YAML as it is."""


NUMBERS: list[Any] = [
    0, 1, -1, 3.7, -0.0, 1e308, -1e308, 5e-324, 2**31, 2**63, 2**64, -(2**63), 10**30, Raw("1" * 4299), Raw("1" * 5000),
    Raw("-" + "9" * 20000), Raw("0x" + "f" * 20000), Raw("0b" + "1" * 60000), Raw("0o777"), Raw("1_000"),
        Raw(".inf"), Raw("-.inf"),
    Raw(".nan"), Raw("1e999"), Raw("1e-999"), Raw("190:20:30.15"), Raw("12e03"),
]  # fmt: skip
TAGGED = [
    "2024-01-01", "2024-13-45", "2024-02-30 25:61:00", "0000-00-00", "2001-12-14t21:59:43.10-99:99",
    "!!binary R0lGODlhDAAMAIQAAP==",
    '!!binary "%%%"', "!!binary [1]", "!!set {a, b}", "!!omap [a: 1, b: 2]", "!!pairs [a: 1]", "!!int abc",
        "!!int ''", "!!float x",
    "!!bool maybe", "!!null x", "!!str 3", "!!timestamp x", "!!map [1]", "!!seq {a: 1}",
    "!!python/object/apply:os.system ['true']",
    "!!python/name:os.system", "!foo bar", "=", "<<", "*unknown", "&a [*a]", "&a {b: *a}", "&a {<<: *a}", "{? [a, b] : c}",
    "{? {a: 1} : 2}", "{[1]: 2}", "{1: 2}", "{null: 2}", "{true: 1}", "{.nan: 1}", "{name: x, name: y}", "{<<: [1, 2]}",
    '"\\ud800"', '"\\0"', '"\\x1b[31mred"', '"\\u202e"', "'\U0001f600'",
]  # fmt: skip
TEXTS: list[Any] = [
    "", " ", "x", "None", "null", "true", "a" * 100_000, "../" * 50 + "etc/passwd", "/etc/shadow",
    "/proc/self/environ", "~", "%s%n", ".",
    "..", "a..b", ".a", "os.path", "json.tool", "sys.exit", "scoreaction.cli", "unittest.__main__", "meta",
    "cuda:99", "xla", "auto",
    "digits", "ink", "linear", "sqdf", "bf16", "ink\u200b",
]  # fmt: skip
OTHERS: list[Any] = [
    None, True, False, [], {}, [[]], [None], [1, "a", None], {"a": {"b": {}}}, {"name": None}, {"name": []}, {"name": "x.y.z"},
    [{"name": "ink"}] * 3, list(range(1000)), {str(i): i for i in range(1000)},
]  # fmt: skip
VALUES = [*NUMBERS, *map(Raw, TAGGED), *TEXTS, *OTHERS]
KEYS = [
    "",
    " ",
    "name",
    "beta",
    "Model",
    "model ",
    "mod\u0435l",
    "0",
    "null",
    "<<",
    "=",
    "__class__",
    "x" * 5000,
    "a\nb",
    "\u202e",
    "*",
    "!x",
]
BYTES = [
    b"{",
    b"}",
    b"[",
    b"]",
    b": ",
    b"- ",
    b"&a ",
    b"*a",
    b"!!",
    b"|",
    b"'",
    b'"',
    b"#",
    b"%",
    b"@",
    b"\t",
    b"\x00",
    b"\xff",
    b"? ",
    b"<<: ",
]


def written(value: Any) -> str:
    """YAML in flow style; `Raw` goes as it is."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, dict):
        return (
            "{"
            + ", ".join(f"{written(k) if isinstance(k, Raw) else json.dumps(k)}: {written(v)}" for k, v in value.items())
            + "}"
        )
    if isinstance(value, list):
        return "[" + ", ".join(map(written, value)) + "]"
    return json.dumps(value)


def _places(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from _places(value, (*at, key))


def _at(tree: Any, place: tuple[Any, ...]) -> Any:
    for part in place:
        tree = tree[part]
    return tree


def _changed(tree: Any, draw: random.Random) -> None:
    """One change of a recipe's values, in place."""
    places = [place for place in _places(tree) if place]
    place = draw.choice(places)
    parent, key = _at(tree, place[:-1]), place[-1]
    value, depth = parent[key], draw.choice([10, 90, 200, 900, 3000, 20000])
    how = draw.choice(["delete", "rename", "repeat", "value", "value", "value", "number", "nest", "deep", "insert", "swap"])
    if how == "delete":
        del parent[key]
    elif how == "rename" and isinstance(parent, dict):
        parent[draw.choice([key[:-1], key + "s", key.upper(), key[::-1], *KEYS])] = parent.pop(key)
    elif how == "repeat" and len(place) > 1:
        again = f"{json.dumps(key)}: {written(draw.choice(VALUES))}"
        _at(tree, place[:-2])[place[-2]] = Raw(f"{written(parent)[:-1]}, {again}}}")
    elif how == "number":
        numbers = [p for p in places if isinstance(_at(tree, p), int | float)]
        place = draw.choice(numbers) if numbers else place
        _at(tree, place[:-1])[place[-1]] = draw.choice(NUMBERS)
    elif how == "nest":
        parent[key] = draw.choice([[value], {"a": value}, [[value]], {"name": value}, [value, value]])
    elif how == "deep":
        parent[key] = Raw(draw.choice(["[" * depth + "1" + "]" * depth, "{a: " * depth + "1" + "}" * depth]))
    elif how == "insert" and isinstance(value, dict):
        value[draw.choice(KEYS)] = draw.choice(VALUES)
    elif how == "swap":
        other = draw.choice(places)
        parent[key], _at(tree, other[:-1])[other[-1]] = copy.deepcopy(_at(tree, other)), copy.deepcopy(value)
    else:
        parent[key] = draw.choice(VALUES)


def _cut(text: str, draw: random.Random) -> bytes:
    """A recipe's text with a few bytes flipped, put in, left out or repeated."""
    data = bytearray(text.encode())
    for _ in range(draw.choice([1, 1, 2, 4, 8])):
        i = draw.randrange(len(data))
        how = draw.choice(["flip", "cut", "insert", "drop", "copy"])
        if how == "flip":
            data[i] = draw.randrange(256)
        elif how == "cut":
            del data[i + 1 :]
        elif how == "insert":
            data[i:i] = draw.choice(BYTES)
        elif how == "drop":
            del data[i : i + draw.randrange(1, 20)]
        else:
            j = draw.randrange(len(data))
            data[i:i] = data[j : j + draw.randrange(1, 60)]
        if not data:
            break
    return bytes(data)


def _bomb(levels: int, width: int) -> str:
    lists = [f"- &a0 [{', '.join(['lol'] * width)}]"]
    lists += [f"- &a{i} [{', '.join([f'*a{i - 1}'] * width)}]" for i in range(1, levels)]
    return "prompts:\n" + "\n".join(lists)


def special(text: str) -> list[bytes]:
    """Files that are no recipe in any way: empty, of other encodings, of many documents, of aliases that explode."""
    bombs = [
        text.replace("prompts:   null", _bomb(levels, width)).encode() for levels, width in ((3, 9), (9, 9), (20, 2), (30, 2))
    ]
    return [
        b"", b"# x\n", b"model: \x00", "model: \u00e9".encode("latin-1"), text.encode("utf-16"), text.replace("  ",
        "\t").encode(),
        (text + "\n---\n" + text).encode(), b"%YAML 9.9\n---\n" + text.encode(), b"[1, 2]", b"hello", b"3",
        b"model: " + b"[" * 100_000,
        b"\n".join(b" " * i + b"a:" for i in range(2000)), b"\n".join(b"k%d: 1" % i for i in range(5000)),
        b"x" * 200_000 + b": 1",
        b"&a {model: *a, reward: *a, algorithm: *a}", b"&a {<<: *a, model: mixture}", b"model: =", b"name: x", *bombs,
        text.replace("seed: 0", "seed: " + "9" * 5000).encode(), text.replace("seed: 0", "seed: 2024-99-99").encode(),
    ]  # fmt: skip


def malformed(count: int, seed: int) -> Iterator[bytes]:
    """So many files, always the same of a seed: three of four with values changed, the others with bytes."""
    texts = {name: path.read_text() for name, path in catalog.recipes().items()}
    files = special(texts["mixture"])
    yield from files[:count]
    draw = random.Random(seed)
    for _ in range(count - len(files)):
        text = draw.choice([*texts.values()])
        if draw.random() < 0.25:
            yield _cut(text, draw)
            continue
        tree = yaml.safe_load(text)
        for _ in range(draw.choice([1, 1, 1, 2, 3])):
            try:
                _changed(tree, draw)
            except (TypeError, KeyError, IndexError):  # a place that an earlier change took away
                continue
        yield "\n".join(f"{json.dumps(key)}: {written(value)}" for key, value in tree.items()).encode("utf-8", "surrogatepass")
