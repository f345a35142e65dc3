"""Truth: prompts written out: a parquet file made by pyarrow itself, where it is installed, beside the same as JSON lines."""

from __future__ import annotations

import json
import sys
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from twins import accepts, same

from scoreaction.errors import UserError
from scoreaction.recipes.prompts import read_prompts

ROWS: list[dict[str, Any]] = [
    {"Caption": "a cat", "weight": 2.0, "tags": ["pet"], "day": date(2026, 1, 2)},
    {"Caption": "a dog", "weight": 1.0, "tags": [], "day": date(2026, 1, 3)},
]


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    writer.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_a_parquet_file_is_its_rows(tmp_path: Path) -> None:
    """The same rows as JSON lines give the same prompts. Twins: without the heading, and without the other columns."""
    lines = [{**json.loads(json.dumps(row, default=str)), "prompt": row["Caption"]} for row in ROWS]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    truth = read_prompts(str(tmp_path / "a.jsonl"), tmp_path)
    found = read_prompts(str(parquet(tmp_path / "a.parquet", ROWS)), tmp_path)
    same(found, truth, texts=["a cat", "a dog"], no_prompt=ROWS)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"id": 1, "words": "a cat"}], r"none of its columns \(id, words\) is named prompt"),
        ([{"prompt": None}], "row 1: must have a prompt that is a text"),
        ([{"prompt": "a", "weight": -1.0}], "row 1: weight must be a number"),
    ],
)
def test_a_parquet_file_whose_prompts_are_not_clear_is_refused(rows: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^prompts: .*a.parquet:? {said}"):
        read_prompts(str(parquet(tmp_path / "a.parquet", rows)), tmp_path)


def refusal(path: Path) -> str:
    path.write_text("PAR1", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        read_prompts(str(path), path.parent)
    return str(caught.value)


def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twin: an ending that nothing reads."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)

    def says(line: str) -> None:
        assert "needs the package pyarrow: pip install pyarrow; or write it as .jsonl" in line
        assert "\n" not in line

    accepts(says, refusal(tmp_path / "a.parquet"), of_another=refusal(tmp_path / "a.feather"))


def test_what_is_no_parquet_file_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    assert "cannot be read as parquet" in refusal(tmp_path / "a.parquet")
