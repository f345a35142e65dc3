"""Sampling of a causal network from left to right, with keys and values kept and without.

    python -m benchmarks.causal         # results/causal.csv and table; a minute on one core

The least of three times by the clock of the processor, 16 samples of a random `CausalTransformer` of the default size.
"""

from __future__ import annotations

import time
from unittest.mock import patch

from _harness import Figures, arguments, run_jobs

REPEATS, SAMPLES = 3, 16


def measured(length: int) -> Figures:
    """CPU seconds of both, and whether they drew the same sequences."""
    import torch

    import scoreaction as sa

    torch.manual_seed(0)
    net = sa.CausalTransformer(4, length)
    torch.nn.init.normal_(net.head.weight, std=0.3)
    model = sa.MaskedModel(net, process=sa.Masking(4), length=length, causal=True)

    def drawn() -> tuple[float, torch.Tensor]:
        seconds = []
        for _ in range(REPEATS):
            began = time.process_time()
            x = sa.sample(model, n=SAMPLES)
            seconds.append(time.process_time() - began)
        return min(seconds), x

    kept, first = drawn()
    with patch.object(sa.MaskedModel, "stream", lambda *arguments: None):
        whole, second = drawn()
    return {
        "kept_seconds": kept,
        "whole_seconds": whole,
        "ratio": whole / kept,
        "equal": float((first == second).float().mean()),
    }


if __name__ == "__main__":
    parser = arguments(__doc__ or "", "causal")
    parser.set_defaults(processes=1)
    run_jobs(measured, {str(length): {"length": length} for length in (16, 64)}, parser.parse_args())
