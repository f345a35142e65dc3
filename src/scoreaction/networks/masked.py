"""A model of tokens: a network that fills masks, its reference, its conditions, and guidance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from scoreaction.diffusion.noise import Source, normal
from scoreaction.diffusion.predictions import mapped
from scoreaction.diffusion.processes import Clock, Masking, Process
from scoreaction.diffusion.reveals import product_draws, token_log_prob, tokens_of
from scoreaction.diffusion.solvers import Solver
from scoreaction.diffusion.unmasking import path_kl_of_tokens
from scoreaction.errors import UserError
from scoreaction.networks.adapters import Role
from scoreaction.networks.causal import Streaming
from scoreaction.networks.conditions import concatenate, map_conditions, null_of, take
from scoreaction.networks.gaussian import Guesses
from scoreaction.networks.likeness import Likeness, by_edits
from scoreaction.networks.model import Model
from scoreaction.types import Conditions, Predict, Prediction, Tokens

FEW = 32
"""Up to so many tokens are normalised along the first axis, which torch does several times as fast."""


class MaskedModel(Model):
    """A pretrained network that fills masks, as a policy and its frozen reference.

    `net(tokens, t, cond) -> logits`: tokens (batch, length) integers with `process.mask` at masked positions, t (batch,) in
    [0, 1] with 0 data and 1 all masks (a network may ignore it), logits (batch, length, vocabulary) finite, without the mask.
    Logits of shown positions are not read. The samples that rewards see are tokens (batch, length), or what `decode(tokens)`
    makes of them. Diversity is measured in edits, or by features where there are some. Guidance w is
    `log p_null + w (log p_cond - log p_null)`, normalised at every position. causal: the network predicts each position from
    the tokens before it, whatever is shown to the right; it is then sampled from left to right, and a `Streaming` one reads
    each position once. letters: one for each token, with which reports write sequences. lora_*, encode, null, invert, features
    and export as in `Model`. ValueError for a length below 1, other letters than tokens, a process of
    Gaussian states, and whatever `Model` refuses.

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
        causal: bool = False,
        letters: str | None = None,
        export: Callable[[Path], None] | None = None,
    ) -> None:
        self.causal, self.letters = causal, letters
        if letters is not None and len(letters) != process.vocabulary:
            raise ValueError(f"letters: must be one for each of {process.vocabulary} tokens (got {len(letters)})")
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
        if features is None and decode is None:
            self.likeness = Likeness(lambda seen: by_edits(seen.unflatten(1, (length, -1)).argmax(2)), 64)

    @classmethod
    def restored(cls, net: nn.Module, **description: Any) -> Model:
        kept = {name: value for name, value in description.items() if name.startswith("lora_") or name == "causal"}
        return cls(net, process=description["process"], length=description["shape"][0], **kept)

    def _check_kind(self, process: Process, predicts: str) -> None:
        if not isinstance(process, Masking):
            raise ValueError(f"process: must be sa.Masking(vocabulary=...) (got {process!r}); of Gaussian states take sa.Model")

    @property
    def sampling(self) -> dict[str, Any]:
        solver = "left_to_right" if self.causal else "one_by_one"
        return {"solver": solver, "steps": self.shape[0], "grid": "uniform"}

    def known_from(self, ratio: float) -> float:
        return 0.0

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

    def refuse_solver(self, name: str) -> None:
        if self.causal and name != "left_to_right":
            raise UserError(
                f"sampler.solver: a causal network ignores what {name} shows to its right; use left_to_right, in as many steps"
                " as there are positions"
            )

    def path_log_prob(
        self,
        x0: Tensor,
        conditions: Conditions = None,
        *,
        prompt: Tensor | None = None,
        guidance: float = 1.0,
        reference: bool = False,
    ) -> Tensor:
        """Log probability of the paths from left to right to x0 (batch, length), in nats, by one pass of the network.

        It is that of x0 itself, `sum_n log p(x_n | x_<n)`; arguments as `predict`. ValueError for a network that is not causal.
        """
        if not self.causal:
            raise ValueError("causal: one pass has the probability of a path for a causal network only; add one step at a time")
        predict = self.reference if reference else self.predict
        end = torch.zeros((), dtype=torch.float64)
        prediction: Any = predict(x0, end, conditions, prompt=prompt, guidance=guidance)
        return token_log_prob(prediction.log_prob, x0).sum(1)

    def stream(self, role: Role, conditions: Conditions, prompt: Tensor, guidance: float) -> Predict | None:
        """Predictions along paths from left to right of a causal network that keeps keys and values, without a graph.

        Called with the states of one batch of such paths, one after the other. Only the first masked position is predicted;
        the others are even. None for a network that keeps nothing, or more rows than one call may have.
        """
        net: Any = self.net if role == "policy" else self.reference_net
        weight, rows, mask = self.guidance_weight(guidance), len(prompt), self.process.mask
        guided = weight != 1.0 and conditions is not None
        halves = 2 if guided else 1
        wide = rows * halves > (self.max_rows or rows * halves)
        if not (self.causal and isinstance(net, Streaming)) or wide or not rows or (guided and self.null is None):
            return None
        complete = map_conditions(lambda c: c.to(self.device), take(conditions, prompt))
        if guided:
            complete = concatenate(null_of(complete, self.null), complete)
        following = net.stream(rows * halves, complete)

        @torch.no_grad()
        def predict(x: Tensor, t: Tensor) -> Any:
            place = int((x[0] != mask).sum())
            before = None if place == 0 else x[:, place - 1].repeat(halves)
            with self.autocast():
                logits = self.adapters.call(role, lambda _: following(before), x)
            if guided:
                unconditional, conditional = logits.chunk(2)
                logits = unconditional + weight * (conditional - unconditional)
            self.evaluations.forward += rows * halves
            self._check_output(x[:, place : place + 1], logits[:, None])
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            log_prob = logits.new_full((*x.shape, logits.shape[-1]), -math.log(logits.shape[-1]))
            log_prob[:, place] = torch.log_softmax(logits, -1)
            return tokens_of(log_prob)

        return predict

    def refuse_tokens(self, what: str) -> None:
        raise UserError(f"model: {what} is for models of Gaussian states, and this one's are tokens; leave it out")

    def guesses(self, n: int, draws: int | None, source: Source) -> Guesses:
        """Sequences drawn from the product of the predicted laws, the most probable one without `draws`."""
        uniform = torch.special.ndtr(normal((n, draws or 1, *self.shape), source).double()) if draws else None

        def guesses(rows: Tensor, x: Tensor, prediction: Any) -> Tensor:
            log_prob = prediction.log_prob
            tokens = (
                log_prob.argmax(-1)[:, None] if uniform is None else product_draws(log_prob, take(uniform, rows).to(x.device))
            )
            return torch.where((x == self.process.mask)[:, None], tokens, x[:, None])

        return guesses

    def learner(self, algorithm: Any, setting: Any) -> Any:
        return algorithm.build_on_tokens(setting)

    def kls(self, solver: Solver, times: Tensor, x: Tensor, policy: Any, reference: Any, eta: float) -> tuple[Tensor, Tensor]:
        """Path and chain KL in nats, (batch,) each: where one position is shown a step, they are one."""

        def step(prediction: Tokens, i: int) -> Any:
            one = mapped(lambda part: part[i], prediction)
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
        return tokens_of(torch.zeros(0, *self.shape, self.process.vocabulary, device=x.device))  # type: ignore[return-value]

    def _prediction(self, x: Tensor, t: Tensor, y: Tensor, inside: Tensor | None) -> Prediction:
        y = y.to(torch.promote_types(y.dtype, torch.float32))
        if y.shape[-1] > FEW:
            return tokens_of(torch.log_softmax(y, -1))  # type: ignore[return-value]
        return tokens_of(torch.log_softmax(y.movedim(-1, 0).contiguous(), 0).movedim(0, -1))  # type: ignore[return-value]

    def _check_output(self, x: Tensor, y: Tensor) -> None:
        vocabulary = self.process.vocabulary
        if y.shape != (*x.shape, vocabulary):
            raise ValueError(
                f"the network returned shape {tuple(y.shape)} and the vocabulary is {vocabulary}: logits must be"
                f" {(*x.shape, vocabulary)}, one for each token, without the mask"
            )
        if len(y) and float(y.detach().amin()) == -math.inf:
            never = torch.isneginf(y.detach())
            _, position, token = never.nonzero()[0].tolist()
            raise ValueError(
                f"the network returned the logit -inf for token {token} at position {position}: a probability of 0 makes the KL"
                " infinite; return a finite one, such as -30"
            )


def _never(x: Tensor, t: Tensor) -> Prediction:
    raise AssertionError("a step of tokens asks the network once")


MODELS: dict[type[Clock], type[Model]] = {Masking: MaskedModel}
"""The kinds of models beside `Model`, by their process."""
