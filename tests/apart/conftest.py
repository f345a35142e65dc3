"""A torchvision whose compiled part is made for another build of torch cannot be imported: it declares meta functions for two
operators that part would define. No reward uses them, so they are declared without a body where they are missing.
"""

from __future__ import annotations

import torch

DECLARED = torch.library.Library("torchvision", "FRAGMENT")


def pytest_configure() -> None:
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        return
    except RuntimeError:
        for name in ("nms", "qnms"):
            DECLARED.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
