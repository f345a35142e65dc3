"""Features in which samples are compared: their own numbers, the model's features, or the output of a module of its network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from scoreaction.diffusion.predictions import expand
from scoreaction.errors import nearest
from scoreaction.networks.model import Model

Kind = Literal["samples", "model", "net"]


@dataclass(frozen=True)
class Features:
    """Features of samples, (batch, D) float32; ValueError for settings that do not go together.

    `samples`: the numbers of a sample, tokens one-hot; needs no model. `model`: `model.features`, in which diversity is
    measured. `net`: the output of the module `at` of the pretrained network at time t, the mean over `noises` draws of noise,
    the same for every sample: `mean_j h(alpha_t x0 + sigma_t eps_j)`, without a prompt (Hu et al. 2023, arXiv 2312.08825).

    >>> Features().of(torch.tensor([[1.0, 2.0]]))
    tensor([[1., 2.]])
    >>> Features(vocabulary=3).of(torch.tensor([[2, 0]]))
    tensor([[0., 0., 1., 1., 0., 0.]])
    """

    kind: Kind = "samples"
    at: str | None = None
    t: float = 0.05
    noises: int = 4
    vocabulary: int = 0
    """Of samples that are tokens: how many different ones there are; 0 for numbers."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"features: must be samples, model or net (got {self.kind!r})")
        if (self.at is None) == (self.kind == "net"):
            wrong = "names a module, and features are not net; leave it out" if self.at else "net needs the name of a module"
            raise ValueError(f"at: {wrong}")
        if not 0 < self.t <= 1:
            raise ValueError(f"time: must be above 0 and at most 1 (got {self.t:g})")
        if self.noises < 1:
            raise ValueError(f"noises: must be at least 1 (got {self.noises})")

    def check(self, model: Model) -> None:
        """ValueError where a model has no such features: no module of that name, or no way to ask its network."""
        if self.at is None:
            return
        model.refuse_tokens("features net")
        modules = [name for name, _ in model.reference_net.named_modules() if name]
        if self.at not in modules:
            raise ValueError(f"at: {self.at!r} is no module of {type(model.net).__name__}; {nearest(self.at, modules)}")
        if model.encode is not None and model.null is None:
            raise ValueError(
                "features: net asks without a prompt, which this model has no condition for; take samples or model"
            )

    @torch.no_grad()
    def of(self, samples: Tensor, model: Model | None = None, x0: Tensor | None = None) -> Tensor:
        """Features of samples as rewards see them; `x0` are the same before decoding, of which those of `net` are."""
        if self.kind == "net":
            assert model is not None
            assert self.at is not None
            return self._of_module(model, self.at, model.clean(samples) if x0 is None else x0)
        if self.kind == "model":
            assert model is not None
            return model.features(samples).flatten(1).float()
        if not self.vocabulary:
            return samples.flatten(1).float()
        one_hot = nn.functional.one_hot(samples.clamp(max=self.vocabulary), self.vocabulary + 1)[..., :-1]
        return one_hot.flatten(1).float()

    def _of_module(self, model: Model, at: str, x0: Tensor) -> Tensor:
        outputs: list[Tensor] = []

        def kept(module: nn.Module, inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
            outputs.append((output[0] if isinstance(output, tuple) else output).detach().flatten(1).float())

        x0 = x0.to(model.device)
        t = torch.full((len(x0),), self.t, dtype=torch.float64, device=x0.device)
        prompt = None if model.null is None else torch.zeros(len(x0), dtype=torch.long)
        generator, every = torch.Generator().manual_seed(0), []
        handle = dict(model.reference_net.named_modules())[at].register_forward_hook(kept)
        try:
            for _ in range(self.noises):
                eps = torch.randn(model.shape, generator=generator).to(x0)
                x = expand(model.process.alpha(t), x0) * x0 + expand(model.process.sigma(t), x0) * eps
                with model.uncounted():
                    model.reference(x.to(x0), t, model.null, prompt=prompt)
                every.append(torch.cat(outputs))
                outputs.clear()
        finally:
            handle.remove()
        return torch.stack(every).mean(0)
