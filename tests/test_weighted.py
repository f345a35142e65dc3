"""Weighted sums with parts on one scale, prompts with weights and metadata, and figures by prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from twins import accepts, close, f64, same

import scoreaction as sa
from scoreaction.errors import UserError
from scoreaction.recipes.build import build
from scoreaction.recipes.prompts import prompt_list, read_prompts
from scoreaction.recipes.recipe import dump, load_recipe, resolve
from scoreaction.report.run import prompts_table
from scoreaction.rewards import CountedReward, Reward, RewardError
from scoreaction.rewards._weighted import Part, WeightedSum

FIRST = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 0.1]) + torch.tensor([5.0, -1.0])
LATER = FIRST[:10] + 7


def left(samples: torch.Tensor, prompts: Any) -> torch.Tensor:
    return samples[:, 0]


def right(samples: torch.Tensor, prompts: Any) -> torch.Tensor:
    return samples[:, 1]


def test_a_normalised_part_is_standardised_by_the_first_batch_and_stays_so() -> None:
    """Truth: mean and standard deviation of the first batch, written out."""
    reward = WeightedSum([Part(left, 2.0, normalise=True), Part(right, 3.0)])
    m, s = FIRST[:, 0].double().mean(), FIRST[:, 0].double().std()
    close(reward(FIRST, None), 2 * (FIRST[:, 0] - m) / s + 3 * FIRST[:, 1], atol=1e-5, raw=2 * FIRST[:, 0] + 3 * FIRST[:, 1])
    truth = 2 * (LATER[:, 0] - m) / s + 3 * LATER[:, 1]
    anew = WeightedSum([Part(left, 2.0, normalise=True), Part(right, 3.0)])(LATER, None)
    close(reward(LATER, None), truth, atol=1e-5, by_this_batch=anew, both_normalised=truth - 3 * LATER[:, 1])


def test_the_first_batch_is_whole_though_it_is_begun_in_parts() -> None:
    """Truth: the same batch in one call."""

    class Slowly:
        """Works in the background, five samples at a time."""

        differentiable, rows = False, 5

        def __call__(self, samples: torch.Tensor, prompts: Any) -> torch.Tensor:
            return left(samples, prompts)

        def begin(self, samples: torch.Tensor, prompts: Any) -> Any:
            return lambda: left(samples, prompts)

    def decoded(reward: Any) -> torch.Tensor:
        return CountedReward(WeightedSum([Part(reward, 1.0, normalise=True), Part(right, 1.0)])).begin_decoded(
            FIRST, lambda x: x, None
        )()

    m, s = FIRST[:5, 0].mean(), FIRST[:5, 0].std()
    close(decoded(Slowly()), decoded(left), atol=1e-5, by_the_first_part=(FIRST[:, 0] - m) / s + FIRST[:, 1])


class Answering:
    """A reward in the background whose first answer does not come."""

    differentiable, rows = False, 50

    def __init__(self) -> None:
        self.asked = 0

    def begin(self, samples: torch.Tensor, prompts: Any) -> Any:
        self.asked += 1

        def answer(first: bool = self.asked == 1) -> torch.Tensor:
            if first:
                raise OSError("no answer")
            return samples[:, 0]

        return answer

    def __call__(self, samples: torch.Tensor, prompts: Any) -> torch.Tensor:
        return self.begin(samples, prompts)()


def test_a_first_batch_that_fails_gives_no_moments_and_the_next_one_does() -> None:
    """Truth: mean and standard deviation of the batch that was answered, written out."""
    reward = WeightedSum([Part(Answering(), 1.0, normalise=True)])
    with pytest.raises(RewardError, match="no answer"):
        reward(FIRST, None)
    m, s = LATER[:, 0].double().mean(), LATER[:, 0].double().std()
    close(reward(LATER, None), (LATER[:, 0] - m) / s, atol=1e-5, raw=LATER[:, 0])
    both = torch.cat([FIRST, LATER])[:, 0].double()
    close(reward.moments, [[m, s]], atol=1e-5, of_both=[[both.mean(), both.std()]])


def test_a_constant_part_and_gradients() -> None:
    """A part without spread is only moved to 0; differentiable where every part is, with the weights over the deviations."""
    constant = WeightedSum([Part(lambda x, c: torch.full((len(x),), 7.0), 1.0, normalise=True)])
    close(constant(FIRST, None), torch.zeros(50), raw=7.0)
    reward = WeightedSum(
        [Part(Reward(left, differentiable=True), 2.0, normalise=True), Part(Reward(right, differentiable=True), 3.0)]
    )
    x = FIRST.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(reward(x, None).sum(), x)
    std = float(FIRST[:, 0].std())
    close(gradient[0], [2 / std, 3.0], atol=1e-5, raw=[2.0, 3.0])
    assert reward.differentiable
    assert not WeightedSum([Part(Reward(left, differentiable=True), 1.0), Part(right, 1.0)]).differentiable


SUM = "reward=[{name: linear, direction: [1, 0], weight: 2, normalise: true}, {name: quadratic, center: [0, 0]}]"


@pytest.mark.slow
def test_the_moments_are_part_of_a_checkpoint_and_resuming_is_exact(tmp_path: Path) -> None:
    """Truth: the run that went through. Twin: without the moments the resumed run is another."""
    sizes = ["algorithm.name=ddpo", "train.iterations=4", "train.batch=16", "sampler.steps=3", "train.checkpoint_every=2"]

    def tuner(folder: str) -> sa.Finetuner:
        return build(load_recipe("mixture", [*sizes, SUM]), output=tmp_path / folder)

    def figures(found: list[dict[str, Any]]) -> list[float]:
        return [metrics["reward_mean"] for metrics in found]

    whole = figures(list(tuner("whole")))
    cut = tuner("cut")
    steps = iter(cut)
    begun = figures([next(steps), next(steps)])
    again = tuner("cut")
    assert again.resume()
    saved = again.reward.reward.moments  # type: ignore[attr-defined]
    close(saved, cut.reward.reward.moments, forgotten=f64([[0.0, 1.0], [0.0, 1.0]]))  # type: ignore[attr-defined]
    close(saved[1], [0.0, 1.0], normalised=saved[0])
    assert "/moments" in load_file(tmp_path / "cut" / "checkpoints" / "000002" / "tensors.safetensors")
    forgot = tuner("cut")
    forgot.resume()
    forgot.reward.reward.moments = None  # type: ignore[attr-defined]
    close(begun + figures(list(again)), whole, atol=0.0, forgotten=begun + figures(list(forgot)))


def test_shares_in_a_recipe() -> None:
    recipe = load_recipe("mixture", [SUM])
    assert [block["normalise"] for block in recipe.values()["reward"]] == [True, False]
    from scoreaction.yaml_text import parse_yaml

    assert resolve(parse_yaml(dump(recipe), where="dump")) == recipe
    for wrong, said in {
        "reward.normalise=true": "reward.normalise: a single reward has no normalise",
        "reward=[{name: linear, direction: [1, 0], normalise: 1}]": "reward.0.normalise: must be a valid boolean",
        "reward=[{name: linear, direction: [1, 0], normalize: true}]": "reward.0.normalize: unknown key",
    }.items():
        with pytest.raises(UserError) as caught:
            load_recipe("mixture", [wrong])
        assert str(caught.value).startswith(said)
    with pytest.raises(UserError, match=r"reward\.1: ink does not fit"):
        build(load_recipe("mixture", ["reward=[{name: linear, direction: [1, 0]}, {name: ink}]"]))


# Prompts


def prompts_of(path: Path, text: str) -> Any:
    path.write_text(text, encoding="utf-8")
    return read_prompts(str(path), Path())


def test_json_lines_carry_weights_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    lines = '{"prompt": "two cats", "weight": 3, "count": 2, "of": ["cat"]}\n\n"a dog"\n{"prompt": "a cow"}\n'
    values = prompts_of(path, lines)
    prompts = prompt_list(values) or []
    same(prompts, ["two cats", "a dog", "a cow"], lines=lines.splitlines(), order=prompts[::-1])
    kept = [(prompt.weight, prompt.metadata) if isinstance(prompt, sa.Prompt) else None for prompt in prompts]
    same(kept[0], (3, {"count": 2, "of": ["cat"]}), without_metadata=(3, {}), without_weight=(1, kept[0] and kept[0][1]))
    recipe = load_recipe("digits", ["prompts=[{prompt: seven, weight: 2, font: bold}, 3]"])
    from scoreaction.yaml_text import parse_yaml

    assert resolve(parse_yaml(dump(recipe), where="dump")) == recipe, "a run's recipe holds them whole"
    assert load_recipe("digits", [f"prompts={path}"]).prompts == values


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no prompt; write one a line"),
        ("\n \n", "holds no prompt"),
        ('{"prompt": "a"}\n{"prompt": \n', "line 2: not JSON"),
        ('{"text": "a"}', "line 1: must have a prompt that is a text (got None)"),
        ('{"prompt": 3}', "line 1: must have a prompt that is a text (got 3)"),
        ('{"prompt": "a", "weight": -1}', "line 1: weight must be a number, 0 or more (got -1)"),
        ('{"prompt": "a", "weight": "2"}', "line 1: weight must be a number"),
        ('{"prompt": "a", "weight": NaN}', "line 1: weight must be a number"),
        ('{"prompt": "a", "weight": 0}', "every weight is 0"),
        ("[1]", "line 1: must be a text"),
        ('""', "line 1: is empty"),
    ],
)
def test_wrong_json_lines_are_one_line_that_names_the_place(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    with pytest.raises(UserError) as caught:
        prompts_of(path, text)
    assert str(caught.value).startswith(f"prompts: {path}")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


MARK = "\ufeff"
"""The byte order mark, with which Windows saves a text in UTF-8."""


@pytest.mark.parametrize(
    ("name", "text", "truth", "wrong"),
    [
        ("a.txt", f"{MARK}a cat\r\na dog\r\n", ["a cat", "a dog"], [f"{MARK}a cat", "a dog"]),
        ("a.jsonl", f'{MARK}"a\u2028cat"\n"a dog"', ["a\u2028cat", "a dog"], ["a", "cat", "a dog"]),
        ("a.JSON", '[\n "a cat",\n "a dog"\n]', ["a cat", "a dog"], ["[", '"a cat",', '"a dog"', "]"]),
        ("a.json", '[{"prompt": "a cat", "weight": 2}]', [{"prompt": "a cat", "weight": 2}], ["a cat"]),
        ("a.json", '{"prompt": "a cat"}\n"a dog"', [{"prompt": "a cat"}, "a dog"], ["a cat", "a dog"]),
        ("a.csv", 'Prompt\n"a cat, black"\n', ["a cat, black"], ["Prompt", '"a cat, black"']),
        ("a.csv", "a cat\na dog\n", ["a cat", "a dog"], ["a dog"]),
        ("a.csv", "weight;prompt\n2;a cat\n", [{"weight": 2.0, "prompt": "a cat"}], ["weight;prompt", "2;a cat"]),
        ("a.tsv", "id\tCaption\n7\ta cat\n", [{"id": "7", "Caption": "a cat", "prompt": "a cat"}], ["7", "a cat"]),
    ],
)
def test_a_file_of_prompts_is_read_by_its_ending(name: str, text: str, truth: Any, wrong: Any, tmp_path: Path) -> None:
    """Truth: its prompts, written out. Twin: the lines of the file, or its text with the byte order mark."""
    same(prompts_of(tmp_path / name, text), truth, otherwise=wrong)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.yaml", "- a cat", "must be a .txt, .jsonl"),
        ("a.txt", '["a cat"]', "holds JSON; let its name end in .json"),
        ("a.txt", '{"prompt": "a cat"}\n{"prompt": "a dog"}', "holds JSON; let its name end in .json or .jsonl"),
        ("a.json", '{"prompts": ["a cat"]}', "line 1: must have a prompt"),
        ("a.json", "[[1]]", "item 1: must be a text"),
        ("a.csv", "a cat, black\na dog, white\n", r"none of its columns \(a cat, black\) is named prompt; name the column"),
        ("a.csv", "prompt,k\na,b,c\n", "line 2: must have 2 cells; put cells with ',' or quotes in quotes"),
        ("a.csv", 'prompt\n"a" b\n', "line 2: must have 1 cells; put cells with"),
        ("a.csv", "prompt,weight\na,much\n", "line 2: weight must be a number"),
        ("a.csv", "", "holds no prompt"),
    ],
)
def test_a_file_whose_prompts_are_not_clear_is_refused(name: str, text: str, said: str, tmp_path: Path) -> None:
    """The right twins are above."""
    with pytest.raises(UserError, match=f"^prompts: {tmp_path / name}:? {said}") as caught:
        prompts_of(tmp_path / name, text)
    assert "\n" not in str(caught.value)


def test_the_shipped_animals_are_apart() -> None:
    seen, unseen = prompt_list("animals") or [], prompt_list("animals_held_out") or []
    close([len(set(seen)), len(set(unseen))], [45, 6], atol=0, exchanged=[6, 45])

    def apart(held_out: list[Any]) -> None:
        assert not set(seen) & set(held_out)

    accepts(apart, unseen, one_of_the_seen=[*unseen, seen[-1]])


class Net(nn.Module):
    """Depends on what it is conditioned on."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, t: torch.Tensor, cond: torch.Tensor) -> torch.Tensor:
        return self.last(torch.cat([x, t[:, None], cond.to(x)[:, None]], 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["draft", "adjoint_matching"])
def test_the_moments_do_not_depend_on_the_pieces_whose_gradient_is_asked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Truth: those of a batch that is scored in one piece. Twin: those of its first piece."""

    def moments(rows: int) -> torch.Tensor:
        sizes = ["train.iterations=1", "train.batch=16", "sampler.steps=3", f"train.max_rows={rows}"]
        tuner = build(load_recipe("mixture", [f"algorithm={{name: {name}}}", *sizes, SUM]))
        list(tuner)
        found = tuner.reward.reward.moments  # type: ignore[attr-defined]
        assert isinstance(found, torch.Tensor)
        return found

    whole, pieces = moments(16), moments(2)
    monkeypatch.setattr("scoreaction.training.collector.settle", lambda *_: None)
    close(pieces, whole, atol=1e-5, first_piece=moments(2))


def tuned(prompts: list[Any], reward: Any, **train: Any) -> sa.Finetuner:
    def encode(texts: list[str]) -> torch.Tensor:
        return torch.tensor([len(text) for text in texts])

    return sa.Finetuner(
        sa.Model(Net(), process=sa.VP(), predicts="v", shape=(2,), encode=encode),
        reward=reward,
        algorithm=sa.DDPO(),
        sampler=sa.Sampler(steps=2),
        train=sa.Train(**{"iterations": 1, "batch": 2000, **train}),
        prompts=prompts,
        evaluation=sa.Evaluation(n=30, steps=2),
    )


def test_prompts_are_drawn_by_their_weights_and_metadata_reaches_the_reward() -> None:
    """Truth: the binomial's mean within four standard deviations."""
    seen: list[Any] = []

    def reward(samples: torch.Tensor, prompts: list[Any]) -> torch.Tensor:
        seen.extend(prompts)
        return samples[:, 0]

    prompts = [sa.Prompt("a", weight=3, metadata={"count": 1}), sa.Prompt("bb", weight=1), sa.Prompt("ccc", weight=0)]
    list(tuned(prompts, reward))
    share = seen.count("a") / len(seen)
    close(share, 0.75, atol=4 * (0.75 * 0.25 / 2000) ** 0.5, uniform=1 / 3, without_the_zero=0.5)
    assert {prompt.metadata["count"] for prompt in seen if prompt == "a"} == {1}
    assert "ccc" not in seen


def test_equal_weights_draw_what_plain_prompts_draw() -> None:
    def drawn(prompts: list[Any]) -> list[str]:
        seen: list[str] = []
        list(tuned(prompts, lambda samples, asked: seen.extend(asked) or samples[:, 0], batch=16))  # type: ignore[func-returns-value]
        return seen

    equal = drawn([sa.Prompt("a", weight=2.0), sa.Prompt("bb", weight=2.0)])
    same(equal, drawn(["a", "bb"]), other_weights=drawn([sa.Prompt("a", weight=2.0), "bb"]))


def test_a_summary_has_the_mean_of_each_prompt(tmp_path: Path) -> None:
    """Truth: a reward that is the prompt's length."""
    tuner = tuned(["a", "bb", "ccc"], lambda samples, prompts: torch.tensor([float(len(p)) for p in prompts]), batch=8)
    list(tuner)
    found = tuner.summary()["prompts"]
    assert [row["prompt"] for row in found] == ["a", "bb", "ccc"]
    for kind in ("base", "tuned"):
        close([row[f"reward_{kind}"] for row in found], [1.0, 2.0, 3.0], mean=[2.0, 2.0, 2.0], order=[3.0, 2.0, 1.0])


def test_the_report_shows_who_gained_most_and_least() -> None:
    few = [{"prompt": p, "reward_base": 1.0, "reward_tuned": 1.0 + gain} for p, gain in (("a", 0.5), ("b", 2.0))]
    turned = [{**row, "reward_base": row["reward_tuned"], "reward_tuned": row["reward_base"]} for row in few]
    same([row[0] for row in prompts_table(few).rows], ["b", "a"], losses=[row[0] for row in prompts_table(turned).rows])
    same(prompts_table(few).rows[0], ["b", "1", "3", "2"], base_for_tuned=prompts_table(turned).rows[-1])
    many = [{"prompt": str(i), "reward_base": 0.0, "reward_tuned": float(i)} for i in range(50)]
    rows = prompts_table(many).rows
    assert [rows[0][0], rows[-1][0], len(rows)] == ["49", "0", 20]


@pytest.mark.slow
def test_evaluate_takes_other_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from scoreaction.cli import main

    run = tmp_path / "run"
    sizes = [
        "train.iterations=1",
        "train.batch=4",
        "evaluation.n=4",
        "evaluation.steps=2",
        "sampler.steps=2",
        "algorithm.name=ddpo",
    ]
    assert main(["train", "digits", *sizes, "--output", str(run)]) == 0
    (tmp_path / "mine.txt").write_text("3\n7\n")
    assert main(["evaluate", str(run), "--steps", "2", "--n", "4", "--prompts", str(tmp_path / "mine.txt")]) == 0
    found = json.loads((run / "evaluation.json").read_text())
    same(list(found["grid"][0]["by_prompt"]), ["3", "7"], the_runs_own=load_recipe("digits").prompts)
    both = ["--prompts", "run", "--prompts", str(tmp_path / "mine.txt"), "--base"]
    assert main(["evaluate", str(run), "--steps", "2", "--n", "4", *both]) == 0
    grid = json.loads((run / "evaluation.json").read_text())["grid"]
    of = {(row["model"], Path(row["prompts"]).stem): row for row in grid}
    assert {**of["tuned", "mine"], **found["grid"][0]} == of["tuned", "mine"]  # as it was measured alone
    summary = json.loads((run / "summary.json").read_text())
    close(of["base", "run"]["reward"], summary["reward_base"], of_the_tuned=of["tuned", "run"]["reward"])
    same([key for key in of["base", "run"] if key.startswith("kl")], [], of_the_tuned=["kl_nats"])
    capsys.readouterr()
    assert main(["evaluate", str(run), "--prompts", "animals"]) == 2
    assert capsys.readouterr().err.startswith("--prompts: ")
    assert main(["evaluate", str(run), "--prompts", "animlas"]) == 2
    assert capsys.readouterr().err.startswith("--prompts: 'animlas' is neither a shipped set nor a text file")
