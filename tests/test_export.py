"""Truth: the samples of the tuner that was saved."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from twins import same

import scoreaction as sa


class Own(nn.Module):
    """A network of the user's own, with plain attributes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.scales = width, (1.0, 2)
        self.body = nn.Sequential(nn.Linear(3, width), nn.SiLU(), nn.Linear(width, 2))

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: None) -> torch.Tensor:
        return x + self.scales[0] * self.body(torch.cat([x, t[:, None]], 1))


class Closure(Own):
    """One whose attribute cannot be written down."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.hidden = lambda x: x


def tuned(net: nn.Module, **options: Any) -> sa.Finetuner:
    model = sa.Model(net, process=sa.VP(), predicts="v", shape=(2,), **options)
    train = sa.Train(iterations=2, batch=8, lr=0.05)
    tuner = sa.Finetuner(model, reward=lambda x, c: x[:, 0], algorithm=sa.DDPO(), sampler=sa.Sampler(steps=4), train=train)
    assert len(list(tuner)) == 2
    return tuner


def drawn(model: sa.Model, *, reference: bool = False) -> torch.Tensor:
    return sa.sample(model, n=16, steps=5, reference=reference)


def test_load_is_the_inverse_of_save(tmp_path: Path) -> None:
    tuner = tuned(Own(8))
    tuner.save(tmp_path / "out")
    policy, base = drawn(tuner.model), drawn(tuner.model, reference=True)
    for again in (sa.load(tmp_path / "out"), sa.load(tmp_path / "out", net=Own(8))):  # and one with weights of its own
        same(drawn(again), policy, base_weights=drawn(again, reference=True))
        same(drawn(again, reference=True), base, tuned_weights=drawn(again))
    assert not list((tmp_path / "out").glob("*.p*t*l"))


def test_a_lora_is_loaded_with_its_rank_and_alpha(tmp_path: Path) -> None:
    options = {"lora_rank": 2, "lora_alpha": 8.0, "lora_targets": ["body.0"]}
    net = Own(8)
    base = {name: value.clone() for name, value in net.state_dict().items()}
    tuner = tuned(net, **options)
    tuner.save(tmp_path)
    fresh = Own(8)
    fresh.load_state_dict(base)
    for again in (sa.load(tmp_path), sa.load(tmp_path, net=fresh)):
        assert torch.equal(drawn(again), drawn(tuner.model))
        assert torch.equal(drawn(again, reference=True), drawn(tuner.model, reference=True))
        assert not torch.equal(drawn(again), drawn(again, reference=True))
    other = sa.Model(Own(8), process=sa.VP(), predicts="v", shape=(2,), **{**options, "lora_alpha": 4.0})
    with pytest.raises(ValueError, match="another model than the one that was saved: lora differ"):
        sa.load(tmp_path, net=other)


@pytest.mark.slow
def test_what_it_was_trained_with_is_what_it_is_drawn_with(tmp_path: Path) -> None:
    sampler = sa.Sampler(steps=3, guidance=2.0, grid="uniform")
    model = sa.models.digits.build(sa.models.digits.Config())
    tuner = sa.Finetuner(
        model, reward=lambda x, c: x.mean((1, 2, 3)), algorithm=sa.DDPO(), sampler=sampler, prompts=["3", "7"],
        train=sa.Train(iterations=1, batch=4),
    )  # fmt: skip
    list(tuner)
    tuner.save(tmp_path)
    again = sa.load(tmp_path, net=sa.models.digits.build(sa.models.digits.Config()))
    truth = sa.sample(tuner.model, n=4, steps=3, guidance=2.0, grid="uniform", prompts=["3", "7"])
    others = {"guidance": {"guidance": 1.0}, "grid": {"grid": "power"}, "prompts": {"prompts": ["3"]}}
    wrong = {name: sa.sample(again, n=4, steps=3, **other) for name, other in others.items()}
    for found in (tuner.model, again):
        same(sa.sample(found, n=4, steps=3), truth, **wrong)


def test_what_is_frozen_stays_frozen(tmp_path: Path) -> None:
    net = Own(8)
    net.body[0].requires_grad_(False)
    tuner = tuned(net)
    tuner.save(tmp_path)
    again = sa.load(tmp_path)
    whole = tuned(Own(8)).model
    same(list(again.parameters), ["body.2.weight", "body.2.bias"], all_of_them=list(whole.parameters))
    same(list(again.parameters), list(tuner.model.parameters), all_of_them=list(whole.parameters))
    same(drawn(again), drawn(tuner.model), base=drawn(again, reference=True))


def test_what_decodes_is_asked_for(tmp_path: Path) -> None:
    """Without it the samples would be others, and nothing would say so."""

    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    net = Own(8)
    base = {name: value.clone() for name, value in net.state_dict().items()}
    tuner = tuned(net, decode=double)
    tuner.save(tmp_path)
    fresh = Own(8)
    fresh.load_state_dict(base)
    for given in (None, fresh):
        with pytest.raises(ValueError, match="the model's decode cannot be rebuilt"):
            sa.load(tmp_path, net=given)
    again = sa.load(tmp_path, net=sa.Model(fresh, process=sa.VP(), predicts="v", shape=(2,), decode=double))
    assert torch.equal(drawn(again), drawn(tuner.model))


def test_a_network_that_cannot_be_described_is_asked_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Closure(8)
    base = {name: value.clone() for name, value in net.state_dict().items()}
    tuner = tuned(net)
    tuner.save(tmp_path)
    with pytest.raises(ValueError, match="net="):
        sa.load(tmp_path)
    fresh = Closure(8)
    fresh.load_state_dict(base)
    again = sa.load(tmp_path, net=fresh)
    assert torch.equal(drawn(again), drawn(tuner.model))
    assert torch.equal(drawn(again, reference=True), drawn(tuner.model, reference=True))


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    tuned(Own(8)).save(tmp_path)
    with pytest.raises(ValueError, match=r"belongs to another network: .* body\.0\.weight"):
        sa.load(tmp_path, net=Own(9))
    (tmp_path / "reference.safetensors").unlink()
    with pytest.raises(ValueError, match=r"body\.0\.weight has shape \(8, 3\)"):
        sa.load(tmp_path, net=Own(9))
    with pytest.raises(ValueError, match="no model.json"):
        sa.load(tmp_path / "nothing")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        tuned(Own(8)).save(tmp_path / "file")


class Dropping(Own):
    """One with dropout, and a layer that has the name of a wrapped one."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.base_layer, self.drop = nn.Linear(2, 2), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: None) -> torch.Tensor:
        return super().forward(x, t, cond) + self.drop(self.base_layer(x))


def test_what_is_loaded_samples_without_dropout(tmp_path: Path) -> None:
    tuner = tuned(Dropping(8))
    tuner.save(tmp_path)
    whole = sa.Model(Dropping(8), process=sa.VP(), predicts="v", shape=(2,))
    found = [drawn(sa.load(tmp_path, net=given)) for given in (None, Dropping(8), whole)]
    whole.net.train()
    for samples in found:
        same(samples, drawn(tuner.model), with_dropout=drawn(whole))


def test_a_folder_that_is_saved_into_again_keeps_nothing_of_before(tmp_path: Path) -> None:
    """Truth: what is saved into an empty folder."""

    def files(folder: Path, *nets: nn.Module) -> set[str]:
        for net in nets:
            tuned(net).save(folder)
        return {path.name for path in folder.iterdir()}

    truth = files(tmp_path / "empty", Closure(8))
    same(files(tmp_path / "again", Own(8), Closure(8)), truth, of_before=files(tmp_path / "other", Own(8)))


def test_selected_weights_give_way_to_loaded_ones(tmp_path: Path) -> None:
    tuner = tuned(Own(8))
    tuner.save(tmp_path)
    other = sa.Model(Own(8), process=sa.VP(), predicts="v", shape=(2,))
    other.select_weights()
    selected = drawn(other)
    same(drawn(sa.load(tmp_path, net=other)), drawn(tuner.model), selected=selected)


class Told(Own):
    """Depends on numbers that it is conditioned on."""

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(x, t, None) + 0.1 * cond[:, None]


def test_prompts_that_are_numbers_and_a_negative_one_come_back(tmp_path: Path) -> None:
    def made() -> sa.Model:
        def encode(prompts: list[int]) -> torch.Tensor:
            return torch.tensor([float(prompt) for prompt in prompts])

        torch.manual_seed(0)
        return sa.Model(Told(8), process=sa.VP(), predicts="v", shape=(2,), encode=encode, null=torch.zeros(1))

    tuner = sa.Finetuner(
        made(), reward=lambda x, c: x[:, 0], algorithm=sa.DDPO(), prompts=[1, 2], train=sa.Train(iterations=1, batch=4),
        sampler=sa.Sampler(steps=3, guidance=3.0, negative_prompt="5"),
    )  # fmt: skip
    list(tuner)
    tuner.save(tmp_path)
    again = sa.load(tmp_path, net=made())
    same(again.prompts, [1, 2], as_texts=["1", "2"])
    found = drawn(again)
    again.null = torch.zeros(1)
    same(found, drawn(tuner.model), without_the_negative_one=drawn(again))


@pytest.mark.parametrize(
    ("data", "says"),
    [(b"", "damaged or cut short"), (b"\xff" * 64, "damaged or cut short"), (None, "holds numbers that are not finite")],
    ids=["empty", "noise", "not_finite"],
)
def test_damaged_weights_are_refused_in_a_line(data: bytes | None, says: str, tmp_path: Path) -> None:
    """Twin: the weights as they were saved."""
    from safetensors.torch import load_file, save_file

    train = sa.Train(iterations=1, batch=4)
    tuner = sa.Finetuner(
        sa.Model(Own(8), process=sa.VP(), predicts="v", shape=(2,)),
        reward=lambda x, c: x[:, 0],
        algorithm=sa.DDPO(),
        train=train,
    )
    tuner.save(tmp_path)
    assert sa.load(tmp_path).shape == (2,)
    file = tmp_path / "weights.safetensors"
    if data is None:
        save_file({name: value * float("nan") for name, value in load_file(file).items()}, file)
    else:
        file.write_bytes(data)
    with pytest.raises(ValueError, match=says):
        sa.load(tmp_path)
