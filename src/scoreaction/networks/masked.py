"""A model of tokens: a network that fills masks, its reference, its conditions, and guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scoreaction.diffusion.processes import Clock, Masking, Process
from scoreaction.diffusion.solvers import Solver
from scoreaction.diffusion.unmasking import path_kl_of_tokens
from scoreaction.errors import UserError
from scoreaction.networks.model import Model
from scoreaction.types import Conditions, Prediction, Tokens


class MaskedModel(Model):
    """A pretrained network that fills masks, as a policy and its frozen reference.

    `net(tokens, t, cond) -> logits`: tokens (batch, length) integers with `process.mask` at masked positions, t (batch,) in
    [0, 1] with 0 data and 1 all masks (a network may ignore it), logits (batch, length, vocabulary) finite, without the mask.
    Logits of shown positions are not read. The samples that rewards see are tokens (batch, length), or what `decode(tokens)`
    makes of them. Diversity is measured in the tokens themselves. Guidance w is `log p_null + w (log p_cond - log p_null)`,
    normalised at every position. lora_*, encode, null, invert, features and export as in `Model`. ValueError for a length
    below 1, a process of Gaussian states, and whatever `Model` refuses.

    >>> class Even(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.logits = nn.Parameter(torch.zeros(3, 4))
    ...     def forward(self, tokens, t, cond): return self.logits.expand(len(tokens), -1, -1)
    >>> model = MaskedModel(Even(), process=Masking(vocabulary=4), length=3)
    >>> from scoreaction import sample
    >>> sample(model, n=2).shape, int(sample(model, n=100).max())
    (torch.Size([2, 3]), 3)
    """

    process: Masking  # type: ignore[assignment]  # what reads a Gaussian's alpha and sigma is not built for this kind

    def __init__(
        self,
        net: nn.Module,
        *,
        process: Masking,
        length: int,
        lora_rank: int | None = None,
        lora_alpha: float | None = None,
        lora_targets: Sequence[str] | None = None,
        encode: Callable[[list[Any]], Conditions] | None = None,
        null: Conditions = None,
        decode: Callable[[Tensor], Tensor] | None = None,
        invert: Callable[[Tensor], Tensor] | None = None,
        features: Callable[[Tensor], Tensor] | None = None,
        law: Any = None,
        export: Callable[[Path], None] | None = None,
    ) -> None:
        if length < 1:
            raise ValueError(f"length: must be at least 1 (got {length})")
        super().__init__(
            net,
            process=process,  # type: ignore[arg-type]
            predicts="x0",
            shape=(length,),
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            lora_targets=lora_targets,
            encode=encode,
            null=null,
            decode=decode,
            invert=invert,
            features=features or (self._one_hot if decode is None else None),
            law=law,
            export=export,
        )

    @classmethod
    def restored(cls, net: nn.Module, **description: Any) -> Model:
        lora = {name: value for name, value in description.items() if name.startswith("lora_")}
        return cls(net, process=description["process"], length=description["shape"][0], **lora)

    def _check_kind(self, process: Process, predicts: str) -> None:
        if not isinstance(process, Masking):
            raise ValueError(f"process: must be sa.Masking(vocabulary=...) (got {process!r}); of Gaussian states take sa.Model")

    @property
    def sampling(self) -> dict[str, Any]:
        return {"solver": "one_by_one", "steps": self.shape[0], "grid": "uniform"}

    @property
    def size(self) -> int:
        return self.shape[0] * self.process.vocabulary

    def example(self, n: int, generator: torch.Generator) -> Tensor:
        order = torch.randperm(n * self.shape[0], generator=generator)  # all tokens, where there is room for them
        return (order % self.process.vocabulary).reshape(n, *self.shape).to(self.device)

    def _checked_data(self, samples: Tensor) -> Tensor:
        tokens, vocabulary = samples.long(), self.process.vocabulary
        if not bool(((tokens == samples) & (tokens >= 0) & (tokens < vocabulary)).all()):
            raise ValueError(f"its samples must be tokens, whole numbers from 0 to {vocabulary - 1}")
        return tokens

    def refuse_tokens(self, what: str) -> None:
        raise UserError(f"model: {what} is for models of Gaussian states, and this one's are tokens; leave it out")

    def learner(self, algorithm: Any, setting: Any) -> Any:
        return algorithm.build_on_tokens(setting)

    def kls(self, solver: Solver, times: Tensor, x: Tensor, policy: Any, reference: Any, eta: float) -> tuple[Tensor, Tensor]:
        """Path and chain KL in nats, (batch,) each: where one position is shown a step, they are one."""

        def step(prediction: Tokens, i: int) -> Any:
            one = Tokens(prediction.log_prob[i])
            return solver.step(self.process, _never, one, x[i], times[i], times[i + 1], eta, None)

        chain = torch.stack([step(policy, i).kl(step(reference, i)) for i in range(len(x))]).sum(0)
        return (chain if solver.single else path_kl_of_tokens(self.process, times, x, policy, reference)), chain

    def add_consistency(self, lora: Any = None) -> dict[str, nn.Parameter]:
        """ValueError: there is no ODE whose end a network could learn."""
        self.refuse_tokens("a consistency model")
        return {}

    def _one_hot(self, tokens: Tensor) -> Tensor:
        return nn.functional.one_hot(tokens, self.process.vocabulary).flatten(1).float()

    def _nothing(self, x: Tensor) -> Prediction:
        return Tokens(torch.zeros(0, *self.shape, self.process.vocabulary, device=x.device))  # type: ignore[return-value]

    def _prediction(self, x: Tensor, t: Tensor, y: Tensor, inside: Tensor | None) -> Prediction:
        wide = torch.promote_types(y.dtype, torch.float32)
        return Tokens(torch.log_softmax(y.to(wide), -1))  # type: ignore[return-value]

    def _check_output(self, x: Tensor, y: Tensor) -> None:
        vocabulary = self.process.vocabulary
        if y.shape != (*x.shape, vocabulary):
            raise ValueError(
                f"the network returned shape {tuple(y.shape)} and the vocabulary is {vocabulary}: logits must be"
                f" {(*x.shape, vocabulary)}, one for each token, without the mask"
            )
        never = torch.isneginf(y.detach())
        if bool(never.any()):
            _, position, token = never.nonzero()[0].tolist()
            raise ValueError(
                f"the network returned the logit -inf for token {token} at position {position}: a probability of 0 makes the KL"
                " infinite; return a finite one, such as -30"
            )


def _never(x: Tensor, t: Tensor) -> Prediction:
    raise AssertionError("a step of tokens asks the network once")


MODELS: dict[type[Clock], type[Model]] = {Masking: MaskedModel}
"""The kinds of models beside `Model`, by their process."""
