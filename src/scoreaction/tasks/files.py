"""Files of users that hold samples: arrays of an .npz without pickles, and pictures."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
"""Endings of the files that are pictures."""


def array_names(path: Path) -> list[str]:
    """The names of the arrays of an .npz; ValueError as in `read_arrays`."""
    read_arrays(path)
    with zipfile.ZipFile(path) as file:
        return [name.removesuffix(".npy") for name in file.namelist()]


def read_arrays(path: Path, *wanted: str) -> dict[str, NDArray[Any]]:
    """Those of the arrays `wanted` that an .npz has, by name; ValueError, which names the file, where it cannot be read."""
    if not path.is_file():
        raise ValueError(f"{path} is not there")
    if not zipfile.is_zipfile(path):  # numpy takes other files for pickles, and says how to load those
        raise ValueError(f"{path} is no .npz; write one with numpy.savez")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in wanted if name in arrays.files}
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        why = "it has objects, and only numbers and texts are read" if "Object arrays" in str(error) else f"damaged: {error}"
        raise ValueError(f"{path} cannot be read as an .npz ({why})") from error


def read_picture(path: Path, *, size: int | None = None) -> NDArray[np.float32]:
    """A picture (1 or 3, height, width) in [0, 1], scaled and cropped to a square of `size`; grey ones have one channel.

    ValueError, which names the file, where it is none.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as picture:
            kind: Literal["L", "RGB"] = "L" if picture.mode in ("1", "L", "I;16") else "RGB"
            whole = picture.convert(kind)
            square = whole if size is None else ImageOps.fit(whole, (size, size), Image.Resampling.LANCZOS)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is no picture that can be read ({error})") from error
    pixels = np.atleast_3d(np.asarray(square, dtype=np.float32)) / 255
    return np.ascontiguousarray(np.moveaxis(pixels, 2, 0))
