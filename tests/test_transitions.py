"""Truth: torch.distributions, and the draws themselves."""

import pytest
import torch
from torch.distributions import Independent, Normal, kl_divergence
from twins import F64, accepts, close, f64

from scoreaction.diffusion.transitions import Transition, sum_event


def pair(std, shape=(5, 2, 3)):
    generator = torch.Generator().manual_seed(0)
    a, b, x = torch.randn(3, *shape, generator=generator, dtype=F64)
    return Transition(a, std), Transition(b, std), x


@pytest.mark.parametrize("std", [f64(0.7), f64([0.1, 0.5, 1.0, 2.0, 3.0])], ids=["one", "per_row"])
def test_density_and_kl_agree_with_torch(std):
    here, there, x = pair(std)
    wide = std.reshape(-1, 1, 1).expand(5, 2, 3)
    truth = [Independent(Normal(step.mean, wide), 2) for step in (here, there)]
    density = here.log_prob(x)
    close(density, truth[0].log_prob(x), atol=1e-10, mean_over_dimensions=density / 6, other=there.log_prob(x))
    kl = here.kl(there)
    close(kl, kl_divergence(*truth), atol=1e-10, without_half=2 * kl, mean_over_dimensions=kl / 6)
    close(here.kl(here), 0.0, atol=0.0, there=kl)


def test_ratios_of_many_dimensions_keep_their_digits():
    """Truth: float64; the difference of two float32 log densities is the twin."""
    generator = torch.Generator().manual_seed(0)
    mean, change, noise = torch.randn(3, 8, 262_144, generator=generator)
    std = f64([0.1] * 8)
    now, then, x = Transition(mean + 1e-4 * change, std), Transition(mean, std), mean + 0.1 * noise
    wide = [Transition(step.mean.double(), std) for step in (now, then)]
    truth = wide[0].log_prob(x.double()) - wide[1].log_prob(x.double())
    close(wide[0].log_ratio(wide[1], x.double()), truth, atol=1e-8, reversed=-truth)
    close(now.log_ratio(then, x), truth, atol=1e-4, difference=now.log_prob(x) - then.log_prob(x))


def test_samples_have_mean_and_std():
    step = Transition(f64([1.0, -2.0]).expand(40_000, 2).contiguous(), f64(0.3))
    draws = step.sample(torch.Generator().manual_seed(0))
    close(draws.mean(0), [1.0, -2.0], atol=0.01, zero=[0.0, 0.0])
    close(draws.std(0), [0.3, 0.3], atol=0.005, variance=[0.09, 0.09])
    again = step.sample(torch.Generator().manual_seed(0))
    accepts(lambda other: _same(draws, other), again, other_seed=step.sample(torch.Generator().manual_seed(1)))
    still = Transition(step.mean, f64(0.0)).sample(torch.Generator().manual_seed(0))
    assert torch.equal(still, step.mean)


def _same(a, b):
    assert torch.equal(a, b)


def test_low_precision_is_scored_in_float32():
    """A stored bfloat16 sample scored in bfloat16 arithmetic is off by whole nats at D = 4096."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(1, 4096, generator=generator).bfloat16()
    step = Transition(mean, f64(0.1))
    x = step.sample(generator)
    assert x.dtype == torch.bfloat16
    truth = Independent(Normal(mean.double(), f64(0.1)), 1).log_prob(x.double())
    wrong = -((x - mean) ** 2).sum(1).double() / (2 * 0.01) + truth + ((x.double() - mean.double()) ** 2).sum(1) / (2 * 0.01)
    close(step.log_prob(x).double(), truth, atol=0.05, in_bfloat16=wrong)


def test_steps_without_density_are_refused():
    here, there, x = pair(f64(0.0))
    for call in (lambda: here.log_prob(x), lambda: here.kl(there), lambda: here.log_ratio(there, x)):
        with pytest.raises(ValueError, match="no density"):
            call()
    with pytest.raises(ValueError, match="same std"):
        here.kl(Transition(there.mean, f64(1.0)))
    with pytest.raises(ValueError, match="same std"):
        here.log_ratio(Transition(there.mean, f64(1.0)), x)


def test_sum_event_sums_everything_but_the_batch():
    x = torch.ones(3, 2, 5)
    close(sum_event(x), 10.0, atol=0.0, mean=x.flatten(1).mean(1), last_only=x.sum(-1)[:, 0])
    assert sum_event(x.bfloat16()).dtype == torch.float32
