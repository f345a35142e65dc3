"""Data of users: a table of numbers or pictures, read from a file or a folder; whatever is wrong is said before any work."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scoreaction import catalog
from scoreaction.tasks.files import PICTURES, array_names, read_arrays, read_picture

LEAST = 10
"""Rows that data must have, at least."""


def read_data(data: str | Path, array: str | None, size: int) -> Tensor:
    """A table (n, d) float64, or pictures (n, channels, size, size) float32 in [0, 1], of a folder or a file.

    data: the name of a shipped table, a .csv or .npz file, or a folder of pictures; array: which one of an .npz. Pictures of a
    folder are scaled and cropped to squares. ValueError that begins with the name of the setting at fault.
    """
    path = catalog.tables().get(str(data), Path(data))
    if path.is_dir():
        return _folder(path, size)
    if not path.is_file():
        known = ", ".join(catalog.tables())
        raise ValueError(
            f"data: {path} is not there; give a .csv, an .npz, a folder of pictures, or a table that ships ({known})"
        )
    values = _table_of(path) if path.suffix.lower() in (".csv", ".txt", ".tsv") else _array(path, array)
    if values.ndim in (3, 4):
        return _pictures(values, path)
    if values.ndim not in (1, 2):
        raise ValueError(f"data: {path} must hold a table (rows, columns) or pictures, and has shape {values.shape}")
    return torch.as_tensor(checked(values, path))


def read_table(data: str | Path, array: str | None) -> Tensor:
    """A table (n, d) float64, as `read_data`; ValueError for pictures."""
    table = read_data(data, array, 32)
    if table.ndim != 2:
        raise ValueError(f"data: {data} holds pictures, and a table is needed; make a model of them with scoreaction pretrain")
    return table


def checked(table: NDArray[Any], path: Path) -> NDArray[np.float64]:
    """The table in float64, with two dimensions; ValueError for what no model can be made of."""
    if not (np.issubdtype(table.dtype, np.number) or table.dtype == bool):
        raise ValueError(f"data: {path} must hold numbers, and has {table.dtype}")
    table = table.astype(np.float64)
    table = table[:, None] if table.ndim == 1 else table
    if len(table) < LEAST or table.shape[1] == 0:
        raise ValueError(f"data: {path} has {len(table)} rows of {table.shape[1]} columns; at least {LEAST} rows are needed")
    missing = ~np.isfinite(table)
    if missing.any():
        row, column = np.argwhere(missing)[0]
        raise ValueError(f"data: {path} has {missing.sum()} values that are no number, the first in row {row}, column {column}")
    constant = np.flatnonzero(table.std(0) <= 1e-12 * np.abs(table).max(0))
    if len(constant):
        raise ValueError(f"data: {path} has the same value in every row of column {constant[0]}; leave the column out")
    return table


def _table_of(path: Path) -> NDArray[np.float64]:
    """The numbers of a text file, after a line of names where there is one."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            dialect = csv.excel_tab if path.suffix.lower() == ".tsv" else csv.excel
            lines = [(number, row) for number, row in enumerate(csv.reader(file, dialect), 1) if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"data: {path} is no text of numbers with commas between them ({error})") from error
    rows: list[list[float]] = []
    for place, (number, row) in enumerate(lines):
        try:
            rows.append([float(cell) for cell in row])
        except ValueError as error:
            if place == 0:  # names
                continue
            raise ValueError(f"data: line {number} of {path}: {error}; leave out columns that are no numbers") from error
        if len(rows[-1]) != len(rows[0]):
            raise ValueError(f"data: line {number} of {path} has {len(row)} values, and those before it {len(rows[0])}")
    return np.array(rows, dtype=np.float64).reshape(len(rows), -1)


def _array(path: Path, name: str | None) -> NDArray[Any]:
    try:
        names = array_names(path)
        if name is None and len(names) == 1:
            name = names[0]
        arrays = read_arrays(path, *([] if name is None else [name]))
    except ValueError as error:
        raise ValueError(f"data: {error}") from error
    if name is None or name not in arrays:
        remedy = "name one of them" if name is None else f"there is no {name!r}"
        raise ValueError(f"array: {path} has the arrays {', '.join(names)}; {remedy}")
    return arrays[name]


def _pictures(values: NDArray[Any], path: Path) -> Tensor:
    """Pictures (n, h, w), (n, h, w, c) or (n, c, h, w), of bytes or in [0, 1]."""
    if values.dtype.kind not in "fiub":
        raise ValueError(f"data: {path} must hold numbers, and has {values.dtype}")
    if values.ndim == 3:
        values = values[:, None]
    elif values.shape[1] not in (1, 3) and values.shape[3] in (1, 3):
        values = np.moveaxis(values, 3, 1)
    if values.shape[1] not in (1, 3):
        raise ValueError(f"data: {path} must hold pictures of 1 or 3 channels, and has shape {values.shape}")
    if len(values) < LEAST:
        raise ValueError(f"data: {path} has {len(values)} pictures; at least {LEAST} are needed")
    pixels = values.astype(np.float32) / (255 if values.dtype == np.uint8 else 1)
    if not (np.isfinite(pixels).all() and pixels.min() >= 0 and pixels.max() <= 1):
        raise ValueError(f"data: pictures in {path} must be bytes, or numbers in [0, 1]")
    return torch.as_tensor(np.ascontiguousarray(pixels))


def _folder(path: Path, size: int) -> Tensor:
    """All pictures of a folder, however deep, as squares; grey where all of them are."""
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in PICTURES)
    if len(files) < LEAST:
        raise ValueError(f"data: {path} has {len(files)} pictures ({', '.join(PICTURES)}); at least {LEAST} are needed")
    try:
        pictures = [read_picture(file, size=size) for file in files]
    except ValueError as error:
        raise ValueError(f"data: {error}") from error
    channels = max(len(picture) for picture in pictures)
    return torch.as_tensor(np.stack([np.broadcast_to(picture, (channels, size, size)) for picture in pictures]))
