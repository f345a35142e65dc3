"""Truth: the waves of a signal-to-noise ratio by hand, the double angle, and every process's own ends."""

import math

import pytest
import torch
from twins import accepts, close, f64

import scoreaction as sa
from scoreaction.networks.layers import VectorNet, default_network, time_features, unit_scaled


@pytest.mark.parametrize("log_snr", [-9.0, 2.0, 6.0, 30.0])
def test_time_features_are_sines_and_cosines_of_three_frequencies(log_snr):
    """Rectified flow has `log SNR = 2 log((1 - t)/t)`; beyond 12 the waves stand still."""
    t = 1 / (1 + math.exp(log_snr / 2))
    angle = math.pi / 2 * max(-12, min(12, log_snr)) / 12
    wave = [f(k * angle) for k in (1, 2, 4) for f in (math.sin, math.cos)]
    close(
        time_features(sa.Flow(), f64([t]))[0],
        [t, 1 - t, t, *wave],
        atol=1e-6,
        one_wave_three_times=[t, 1 - t, t, *3 * wave[:2]],
        other_direction=[t, 1 - t, t, *(-w for w in wave)],
        ends_exchanged=[1 - t, t, 1 - t, *wave],
    )


@pytest.mark.parametrize("process", [sa.VP(), sa.Flow(), sa.VE(), sa.CosineVP()], ids=lambda p: type(p).__name__)
def test_each_frequency_doubles_the_one_before_and_times_differ(process):
    """`sin 2a = 2 sin a cos a` and `cos 2a = 1 - 2 sin^2 a`, under any process, up to the ends of time."""
    told = time_features(process, torch.linspace(0, 1, 9, dtype=torch.float64))
    assert told.shape == (9, 9)
    waves = told[:, 3:].reshape(9, 3, 2)

    def doubles(waves):
        sin, cos = waves[:, :-1, 0], waves[:, :-1, 1]
        close(waves[:, 1:, 0], 2 * sin * cos, atol=1e-5)
        close(waves[:, 1:, 1], 1 - 2 * sin**2, atol=1e-5)

    accepts(doubles, waves, one_wave_three_times=waves[:, :1].expand(9, 3, 2), order=waves.flip(1))

    def differ(told):
        assert float(torch.pdist(told).min()) > 1e-3

    accepts(differ, told, constant=told[:1].expand(9, 9), one_twice=torch.cat([told, told[:1]]))


@pytest.mark.parametrize("shape", [(3,), (2, 9), (8, 2), (1, 8, 8), (2, 3, 4, 5)])
def test_a_small_network_sees_state_time_and_condition(shape):
    torch.manual_seed(0)
    net = default_network(sa.VP(), shape, 4)
    x, t, cond = torch.randn(5, *shape), torch.linspace(0.1, 0.9, 5, dtype=torch.float64), torch.randn(5, 4)
    close(net(x, t, cond).detach(), 0.0, atol=0, already_awake=1.0)
    torch.nn.init.normal_(net.last.weight)
    before = net(x, t, cond).detach()
    for moved in ((x + 1, t, cond), (x, t * 0.5, cond), (x, t, cond + 1)):

        def same(value):
            assert float((value - before).abs().max()) < 1e-6

        accepts(same, net(x, t, cond).detach(), moved=net(*moved).detach())


def test_no_small_network_is_made_for_other_shapes():
    for shape in [(), (1, 2, 3, 4, 5)]:
        with pytest.raises(ValueError, match=r"^shape: there is no critic for samples of shape .*; give Model one of your own"):
            default_network(sa.VP(), shape, 0)


@pytest.mark.parametrize("process", [sa.VP(), sa.Flow(), sa.VE()], ids=lambda p: type(p).__name__)
def test_states_come_in_of_order_one(process):
    """`x/sqrt(alpha^2 + sigma^2)` of data and noise of variance 1 has variance 1 at every time."""
    t = f64([0.0, 0.3, 1.0]).repeat_interleave(20_000)
    generator = torch.Generator().manual_seed(0)
    data, noise = (torch.randn(60_000, dtype=torch.float64, generator=generator) for _ in range(2))
    x = process.alpha(t) * data + process.sigma(t) * noise
    close(unit_scaled(process, x[:, None], t).reshape(3, -1).std(1), 1.0, atol=0.02, half=0.5)
    close(VectorNet(process, 1, 2)(x[:4, None].float(), t[:4]).shape, (4, 2), inverted=(2, 4))
