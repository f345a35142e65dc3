"""Messages between a run and `serve-reward` or `serve-writer`: JSON, with samples as npy or PNG in base64.

Never pickle: npy is read by its header, whose type and size must be what follows it. docs/rewards.md has the protocol.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Literal

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from scoreaction.errors import one_line
from scoreaction.rewards._images import picture_files
from scoreaction.types import Prompt

Format = Literal["npy", "png"]
LARGEST_PICTURE, LARGEST_QUESTION = 2**24, 2**28
"""Pixels of a picture and numbers of all of them: a small PNG file may unfold to far more than it weighs."""

MOST_TEXTS, LONGEST_TEXT = 64, 2000
"""Texts that a writer may be asked for, for each prompt, and the characters of one."""


class WireError(ValueError):
    """A message that cannot be read; one line says why."""


def question(samples: Tensor, prompts: Sequence[Any] | None, *, form: Format, texts: int | None = None) -> bytes:
    """The body of a question: samples (batch, ...) and their prompts; to a writer, for so many texts of each prompt."""
    data = [_text(picture) for picture in _png(samples)] if form == "png" else _text(_npy(samples))
    values: dict[str, Any] = {
        "format": form,
        "samples": data,
        "prompts": None if prompts is None else [str(p) for p in prompts],
    }
    if prompts is not None and any(isinstance(p, Prompt) and p.metadata for p in prompts):
        values["metadata"] = [p.metadata if isinstance(p, Prompt) else {} for p in prompts]
    if texts is not None:
        values["texts"] = texts
    return json.dumps(values).encode()


def read_question(body: bytes, *, most: int) -> tuple[Tensor, list[str] | None]:
    """Samples float32 and prompts of a question; WireError where it is not one, or has more than `most` samples."""
    return _parts(_mapping(body), most)


def read_wish(body: bytes, *, most: int) -> tuple[Tensor, list[str], int]:
    """Samples, prompts and the number of texts of a question to a writer; WireError as `read_question`."""
    values = _mapping(body)
    texts = values.pop("texts", None)
    if type(texts) is not int or not 1 <= texts <= MOST_TEXTS:
        raise WireError(f"texts must be a number from 1 to {MOST_TEXTS}, of texts for each prompt")
    samples, prompts = _parts(values, most)
    if prompts is None:
        raise WireError("prompts must be texts, one a sample: there is nothing to write about")
    return samples, prompts, texts


def _parts(values: dict[str, Any], most: int) -> tuple[Tensor, list[str] | None]:
    unknown = sorted(set(values) - {"format", "samples", "prompts", "metadata"})
    if unknown or values.get("format") not in ("npy", "png") or "samples" not in values:
        more = f", got also {', '.join(unknown)}" if unknown else ""
        raise WireError("a question is {format: npy or png, samples, prompts, metadata}" + more)
    samples = _from_png(values["samples"], most) if values["format"] == "png" else _from_npy(_bytes(values["samples"]), most)
    return samples, _prompts(values.get("prompts"), values.get("metadata"), len(samples))


def answer(scores: Tensor) -> bytes:
    """The body of an answer."""
    return json.dumps({"scores": scores.tolist()}).encode()


def read_answer(body: bytes, n: int) -> list[float]:
    """The n scores of an answer; WireError where it has others."""
    scores = _mapping(body).get("scores")
    if not isinstance(scores, list) or not all(isinstance(s, int | float) and not isinstance(s, bool) for s in scores):
        raise WireError("the answer must be {scores: a list of numbers}")
    if len(scores) != n:
        raise WireError(f"the answer has {len(scores)} scores for {n} samples")
    return scores


def texts_answer(texts: Sequence[Sequence[str]]) -> bytes:
    """The body of a writer's answer: the texts of each prompt."""
    return json.dumps({"texts": [list(own) for own in texts]}).encode()


def read_texts(body: bytes, prompts: Sequence[Any], n: int) -> list[list[str]]:
    """The n texts of each prompt of a writer's answer; WireError where it has others."""
    return checked_texts(_mapping(body).get("texts"), prompts, n)


def checked_texts(answer: Any, prompts: Sequence[Any], n: int) -> list[list[str]]:
    """Texts of a writer as lists; WireError where they are not n for each prompt, which differ from it and from one another."""
    if not isinstance(answer, list | tuple) or len(answer) != len(prompts):
        got = f"{len(answer)}" if isinstance(answer, list | tuple) else type(answer).__name__
        raise WireError(f"texts must be {len(prompts)} lists, one a prompt (got {got})")
    for prompt, own in zip(prompts, answer, strict=True):
        where = f"for {one_line(repr(str(prompt)), most=60)}"
        if not isinstance(own, list | tuple) or len(own) != n:
            got = f"{len(own)}" if isinstance(own, list | tuple) else type(own).__name__
            raise WireError(f"texts must be {n} {where} (got {got})")
        fault = next((fault for fault in map(_fault, own) if fault), None)
        if fault is not None:
            raise WireError(f"a text {where} {fault}")
        if str(prompt) in own:
            raise WireError(f"a text {where} is the prompt itself, which a menu has in any case; write another")
        twice = next((text for i, text in enumerate(own) if text in own[:i]), None)
        if twice is not None:
            raise WireError(f"the text {one_line(repr(twice), most=60)} {where} comes twice; write another")
    return [list(own) for own in answer]


def _fault(text: Any) -> str | None:
    """The fault of one text by itself, None where it has none."""
    if not isinstance(text, str):
        return f"is of type {type(text).__name__}"
    if not text.strip():
        return "is empty"
    if len(text) > LONGEST_TEXT:
        return f"has {len(text):,} characters, {LONGEST_TEXT:,} at most"
    if any("\ud800" <= letter <= "\udfff" for letter in text):  # which JSON may hold and no file
        return "holds half a character"
    lines = any(unicodedata.category(letter) in ("Cc", "Zl", "Zp") for letter in text)
    return "holds a line break or another control character" if lines else None


def read_report(body: bytes) -> dict[str, Any]:
    """A report of health or of an error; empty where it is none."""
    with suppress(WireError):
        return _mapping(body)
    return {}


def sendable(token: str) -> bool:
    """True for a token that can stand in a header."""
    return token.isascii() and token.isprintable() and " " not in token and token != ""


def _mapping(body: bytes) -> dict[str, Any]:
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise WireError("not JSON") from error
    if not isinstance(values, dict):
        raise WireError("not a JSON object")
    return values


def _prompts(prompts: Any, metadata: Any, n: int) -> list[str] | None:
    if prompts is None:
        return None
    if not isinstance(prompts, list) or len(prompts) != n or not all(isinstance(p, str) for p in prompts):
        raise WireError(f"prompts must be null or {n} texts, one a sample")
    if metadata is None:
        return prompts
    if not isinstance(metadata, list) or len(metadata) != n or not all(isinstance(m, dict) for m in metadata):
        raise WireError(f"metadata must be null or {n} objects, one a sample")
    return [Prompt(text, metadata=more) for text, more in zip(prompts, metadata, strict=True)]


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _bytes(text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise WireError("samples must be base64") from error


def _npy(samples: Tensor) -> bytes:
    file = io.BytesIO()
    np.save(file, samples.detach().float().cpu().numpy(), allow_pickle=False)
    return file.getvalue()


def _from_npy(data: bytes, most: int) -> Tensor:
    """Only plain numbers in C order, and only as many as there are bytes: nothing is allocated on a header's word."""
    file = io.BytesIO(data)
    try:
        npy.read_magic(file)
        shape, fortran, dtype = npy.read_array_header_1_0(file)
    except ValueError as error:
        raise WireError("samples are not npy of version 1.0") from error
    if dtype.str not in ("<f4", "<f2", "|u1") or fortran:
        raise WireError(f"samples must be npy of type float32, float16 or uint8 in C order, got {dtype}; objects are refused")
    rest = data[file.tell() :]
    if not shape or math.prod(shape) * dtype.itemsize != len(rest) or min(shape) < 1:
        raise WireError(f"samples: the header says shape {shape}, which is not what follows it")
    _few(shape[0], most)
    return torch.from_numpy(np.frombuffer(rest, dtype).reshape(shape).astype(np.float32))


def _png(samples: Tensor) -> list[bytes]:
    if samples.ndim != 4 or samples.shape[1] not in (1, 3):
        raise ValueError(f"format: png is for images (batch, 1 or 3, H, W), got {tuple(samples.shape)}; take npy")
    return picture_files(samples, "PNG", compress_level=1)


def _from_png(texts: Any, most: int) -> Tensor:
    if not isinstance(texts, list) or not texts:
        raise WireError("samples must be a list of PNG files in base64")
    _few(len(texts), most)
    first = _picture(_bytes(texts[0]))
    if len(texts) * first.size > LARGEST_QUESTION:
        size = f"{first.shape[1]} x {first.shape[0]}"
        raise WireError(f"samples: {len(texts)} pictures of {size} at once are too large; ask for fewer")
    pictures = [first, *(_picture(_bytes(text), like=first) for text in texts[1:])]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255


def _picture(data: bytes, *, like: np.ndarray[Any, Any] | None = None) -> np.ndarray[Any, Any]:
    """The pixels (H, W, channels) of a file, refused before it is unfolded where it is too large or not as `like` is."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            if math.prod(picture.size) > LARGEST_PICTURE:
                raise WireError(f"samples: a picture of {picture.size[0]} x {picture.size[1]} pixels is too large")
            if picture.mode not in ("L", "RGB"):
                raise WireError(f"samples: a picture must be gray or RGB with 8 bits, got {picture.mode}")
            kind = (picture.height, picture.width, len(picture.getbands()))
            if like is not None and kind != like.shape:
                raise WireError("samples must be pictures of one size and kind")
            pixels = np.asarray(picture)
    except WireError:
        raise
    except Exception as error:  # whatever a broken file makes pillow raise
        raise WireError("samples: a picture cannot be read as PNG") from error
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _few(n: int, most: int) -> None:
    if n > most:
        raise WireError(f"{n} samples at once are too many, {most} at most")
