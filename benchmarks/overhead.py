"""Wall time of a training iteration, or of steering, against the network work in it, on the digits, as pictures and as tokens.

    python -m benchmarks.overhead         # results/overhead.csv; the median ratio of one run

Bare is the time inside forwards of policy, reference, critic, surrogate, reward and features, and inside backwards, summed
within the same iterations, so that a noisy machine slows both alike. What is left is sampler, bookkeeping and optimiser. Of
tokens: a masked language model of the smallest ESM2's size with random weights, 32 positions, and the small network of pixels.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _harness import Figures, arguments, built, run_jobs

WARM_UP, COUNTED = 1, 5
STEERED = {"svdd": 8, "smc": 8, "twisted": 4, "best_of": 8, "guidance": None}


class Stopwatch:
    """Adds up the time inside wrapped calls; a call inside another is not counted twice."""

    def __init__(self) -> None:
        self.seconds, self.depth = 0.0, 0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.depth += 1
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1
                if self.depth == 0:
                    self.seconds += time.perf_counter() - began

        return timed


@contextmanager
def watched(tuner: Any) -> Iterator[Stopwatch]:
    """Times every network and reward of a tuner, and autograd."""
    watch = Stopwatch()
    backward, grad = torch.autograd.backward, torch.autograd.grad
    networks = [tuner.model.net, tuner.model.reference_net, *tuner.learner.networks.values()]
    for network in {id(network): network for network in networks}.values():
        network.forward = watch.wrap(network.forward)
    tuner.model.decode, tuner.model.features = watch.wrap(tuner.model.decode), watch.wrap(tuner.model.features)
    tuner.reward.reward = _Timed(tuner.reward.reward, watch)
    torch.autograd.backward, torch.autograd.grad = watch.wrap(backward), watch.wrap(grad)
    try:
        yield watch
    finally:
        torch.autograd.backward, torch.autograd.grad = backward, grad


class _Timed:
    def __init__(self, reward: Any, watch: Stopwatch) -> None:
        self.differentiable, self.score = reward.differentiable, watch.wrap(reward.__call__)

    def __call__(self, samples: torch.Tensor, conditions: Any) -> torch.Tensor:
        return self.score(samples, conditions)


def esm2(folder: str) -> list[str]:
    """The settings of a masked language model of the smallest ESM2's size, which is written into a folder."""
    from transformers import EsmConfig, EsmForMaskedLM, EsmTokenizer

    words = ["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVSERTIDPKQNFYMHWCXBUZO", ".", "-", "<null_1>", "<mask>"]
    (Path(folder) / "vocab.txt").write_text("\n".join(words))
    size = {"hidden_size": 320, "num_hidden_layers": 6, "num_attention_heads": 20, "intermediate_size": 1280}
    config = EsmConfig(
        vocab_size=33, mask_token_id=32, pad_token_id=1, position_embedding_type="rotary", token_dropout=True,
        emb_layer_norm_before=False, **size,
    )  # fmt: skip
    EsmForMaskedLM(config).save_pretrained(folder)
    EsmTokenizer(str(Path(folder) / "vocab.txt")).save_pretrained(folder)
    model = f"{{name: masked_lm, path: {folder}, length: 32, alphabet: [{', '.join('ACDEFGHIKLMNPQRSTVW')}, 'Y']}}"
    return [f"model={model}", f"reward={{name: token_scores, tokens: {list(range(20))}}}", "train.batch=8"]


def steered(method: Any, particles: int | None) -> Figures:
    """Wall time over bare time of steered pictures, 64 rows in a call, as often as iterations are counted."""
    from scoreaction.sampling.steering import Steering
    from scoreaction.training.steering import steered as steer_run

    tuner, steering = built("digits"), Steering(method=method, particles=particles)

    def drawn() -> None:
        steer_run(tuner, tuner.sampler, steering, n=64 // (particles or 1), prompts=tuner.prompts, seed=0, reference=True)

    return ratios_of(tuner, drawn)


def measured(algorithm: str, recipe: str) -> Figures:
    """Wall time over bare time of the counted iterations."""
    with tempfile.TemporaryDirectory() as folder:
        model = esm2(folder) if recipe == "esm2" else []
        model += ["algorithm.updates=2", "algorithm.rows=32"] if model and algorithm != "dpok" else []
        fixed = ["evaluation.held_out=[]", f"train.iterations={WARM_UP + COUNTED}"]
        tuner = built("markov_chain" if model else recipe, f"algorithm.name={algorithm}", *model, *fixed)
        return ratios_of(tuner, partial(next, iter(tuner)))


def ratios_of(tuner: Any, iterate: Callable[[], object]) -> Figures:
    """Wall time over bare time of the counted iterations."""
    ratios = []
    with watched(tuner) as watch:
        for iteration in range(WARM_UP + COUNTED):
            watch.seconds = 0.0
            began = time.perf_counter()
            iterate()
            if iteration >= WARM_UP:
                ratios.append((time.perf_counter() - began) / watch.seconds)
    return {"ratio_median": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}


def one_of(**job: Any) -> Figures:
    return steered(**job) if "method" in job else measured(**job)


if __name__ == "__main__":
    parser = arguments(__doc__ or "", "overhead")
    parser.set_defaults(processes=1)
    jobs: dict[str, Figures] = {
        name: {"algorithm": name, "recipe": "digits"} for name in ("score_action", "sqdf", "draft", "ddpo", "dpok")
    }
    jobs |= {
        f"{kind}, {name}": {"algorithm": name, "recipe": recipe}
        for kind, recipe in (("tokens, esm2's size", "esm2"), ("tokens, pixels", "pixels"))
        for name in ("score_action", "ddpp", "dpok")
    }
    jobs |= {f"steering, {method}": {"method": method, "particles": m} for method, m in STEERED.items()}
    run_jobs(one_of, jobs, parser.parse_args())
