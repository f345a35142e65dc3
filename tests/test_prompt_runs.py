"""Truth: a run that chooses prompts is one like all others: measured, saved, resumed, loaded; what does not fit is refused."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from prompt_line import algorithm, biased, model, tuner
from twins import accepts, close, same

import scoreaction as sa
from scoreaction.cli import main
from scoreaction.diffusion.noise import RowNoise
from scoreaction.networks.prompt_chooser import Menu

MENU = 'algorithm.menu={"3": ["3", "8"], "7": ["7", "1"]}'
SMALL = [
    "algorithm={name: prompt_loop, at: [1, 0.5]}", MENU, "prompts=['3', '7']", "train.batch=8", "sampler.steps=4",
    "evaluation.n=8", "evaluation.steps=3", "algorithm.hidden=8", "evaluation.held_out=[]",
]  # fmt: skip
REFUSED = {
    "algorithm.menu=['{prompt}']": "algorithm.menu: a menu of one text leaves nothing to choose",
    "algorithm.menu=['{prompt}', 'a cat']": "algorithm.menu: the template 'a cat' has no {prompt}",
    "algorithm.menu=nowhere.json": "algorithm.menu: no file nowhere.json",
    'algorithm.menu={"3": ["3", "8"], "7": ["7"]}': "algorithm.menu: a menu of one text",
    'algorithm.menu={"3": ["3", "8"], "7": ["7", "1", "2"]}': "algorithm.menu: every prompt needs as many texts .* repeat some",
    'algorithm.menu={"3": ["3", "8"]}': "prompts: algorithm.menu has no entries for '7'; add them",
    "algorithm.menu=['{prompt}', ' ']": "algorithm.menu: the text ' ' is empty",
    "algorithm.menu=['{prompt}', 'a {prompt} of gold']": "prompts: ",
    "algorithm.at=[1, 1.5]": "algorithm.at: times must decrease and lie in",
    "algorithm.at=[0.5, 0.6]": "algorithm.at: times must decrease and lie in",
    "algorithm.at=[1, 0.9, 0.8]": "algorithm.at: two of .* use fewer times, or more sampler.steps",
    "algorithm.at=[1, 0.01]": "algorithm.at: .* or one on none that the policy acts in",
    "algorithm.weights=[1, 0]": "algorithm.weights: give a number above 0 for each of the menu's 2 entries",
    "prompts=null": "prompts: prompt_loop chooses among texts for prompts, and there are none",
    "train.batch=2": "train.samples_per_prompt: prompt_loop compares samples of one prompt",
    "sampler.solver=heun; sampler.eta=0": "sampler.solver: .* chooses prompts between steps",
    "evaluation.certificate=true": "evaluation.certificate: .* this one chooses prompts",
    "steer={method: best_of, particles: 2, beta: 1}": "steer: this policy chooses prompts along whole paths",
}


@pytest.mark.parametrize("line", REFUSED)
def test_a_recipe_that_does_not_fit_is_refused_with_its_key(line, refused, tmp_path):
    said = refused("train", "digits", *SMALL, *line.split("; "), "--output", tmp_path / "run")
    assert re.match(REFUSED[line], said), said
    assert not (tmp_path / "run").exists()


def test_a_model_without_prompts_or_of_tokens_is_refused(refused, tmp_path):
    short = ["algorithm.name=prompt_loop", "--output", str(tmp_path / "run")]
    assert "takes no prompts" in refused("train", "mixture", *short)
    assert "tokens" in refused("train", "markov_chain", *short)


def test_a_menu_is_read_from_a_file_and_kept(tmp_path):
    """Twin: the file is another by then."""
    path = tmp_path / "menu.json"
    path.write_text(json.dumps(["{prompt}", "{prompt}!"]))
    kept = sa.PromptLoop(menu=str(path))
    path.write_text(json.dumps(["{prompt}", "{prompt}?"]))
    again = sa.PromptLoop(**json.loads(kept.model_dump_json()))
    same(again.menu, ["{prompt}", "{prompt}!"], later=sa.PromptLoop(menu=str(path)).menu)
    path.write_text("{prompt}")
    with pytest.raises(ValueError, match="is not JSON"):
        sa.PromptLoop(menu=str(path))


def test_braces_of_a_prompt_are_its_own():
    """A prompt is put where {prompt} stands, once. Twin: as a format string it would fail or be read again."""
    same(Menu(["{prompt}, {prompt}"]).texts(["{0} {prompt}"]), ["{0} {prompt}, {0} {prompt}"], empty=[", "])


@pytest.mark.long
def test_a_run_is_measured_saved_resumed_and_loaded(tmp_path: Path):
    """Samples of the model that is loaded from a run are trained ones; a run that is resumed ends as the whole one."""
    folder = tmp_path / "run"
    command = ["train", "digits", *SMALL, "train.lr=0.3", "train.schedule=constant", "--output"]
    assert main([*command, str(folder), "train.iterations=4"]) == 0
    loaded = sa.load(folder)
    draw = partial(sa.sample, n=8, steps=4, seed=3)
    accepts(lambda x: _apart(x, draw(loaded, reference=True)), draw(loaded), untrained=draw(loaded, reference=True))
    assert main(["evaluate", str(folder), "--steps", "3", "--n", "8"]) == 0
    assert main(["sample", str(folder), "--n", "4"]) == 0
    assert main(["report", str(folder)]) == 0
    assert "sa.load" in (folder / "model" / "README.md").read_text()
    assert json.loads((folder / "summary.json").read_text())["kl_choice_nats"] > 0
    halves = tmp_path / "halves"
    assert main([*command, str(halves), "train.iterations=2"]) == 0
    early = (halves / "model" / "weights.safetensors").read_bytes()
    assert main([*command, str(halves), "train.iterations=4", "--resume"]) == 0
    weights = [(at / "model" / "weights.safetensors").read_bytes() for at in (halves, folder)]
    same(weights[0], weights[1], not_resumed=early)


def _apart(x, y):
    assert float((x - y).abs().max()) > 1e-3


def test_a_model_saved_from_python_still_chooses(tmp_path):
    """Twin: the model as it was before."""
    found = tuner(train={"iterations": 2, "lr": 0.3})
    list(found)
    found.save(tmp_path / "model")
    again = sa.load(tmp_path / "model", net=model())
    draws = [sa.sample(made, n=6, steps=24, seed=1) for made in (again, found.model)]
    same(draws[0], draws[1], before=sa.sample(again, n=6, steps=24, seed=1, reference=True))
    with pytest.raises(ValueError, match="algorithm.menu has no entries for '7'"):
        sa.sample(again, n=2, prompts=["7"])


def test_a_policy_of_prompts_is_no_other_algorithms(tmp_path):
    """It is neither trained again nor distilled, steered or exported for libraries that know no chooser. Twin: one of steps."""
    made = tuner().model
    for other in (sa.DDPO(), algorithm()):
        with pytest.raises(ValueError, match="algorithm.name: this model's policy chooses prompts"):
            tuner(made, algorithm=other)
    trained = model()
    trained.average_weights(0.5)
    with pytest.raises(ValueError, match="algorithm.name: prompt_loop tells the pretrained model"):
        tuner(trained)
    with pytest.raises(ValueError, match="student: this policy chooses prompts"):
        sa.StudentDistiller(made, sa.Student(steps=2, iterations=1), sa.Sampler())
    plain = sa.Reward(lambda x, prompts: x[:, 0])
    steered = partial(sa.steer, made, plain, n=2, method="best_of", particles=2, beta=1.0, steps=4)
    with pytest.raises(ValueError, match="steer: this policy chooses prompts"):
        steered()
    assert len(steered(reference=True).x0) == 2

    def files(chosen, name):
        one = model()
        one.export = lambda path: (path / "lora").write_text("weights")
        tuner(one, algorithm=chosen, train={"batch": 8}).save(tmp_path / name)
        return {path.name for path in (tmp_path / name).iterdir()}

    same("lora" in files(algorithm(), "prompts"), False, of_steps="lora" in files(sa.DDPO(), "steps"))


def test_the_summary_measures_the_kl_of_choices():
    """`log 4` of a certain one, and the path's: what the other prompt's chain is away from the own one's. Twin: none."""
    found = tuner()
    biased(found.model, [0.0, 0.0, 0.0, 40.0])
    summary = found.summary()
    close(summary["kl_choice_nats"], torch.log(torch.tensor(4.0)), atol=1e-5, none=0.0)
    accepts(lambda nats: _above(nats, 0.5), summary["kl_nats"], none=0.0)
    assert summary["reward_tuned"] != summary["reward_base"]


def _above(value, limit):
    assert value > limit, value


def test_an_oracle_in_rounds_is_asked_about_what_is_told():
    """The samples that an `online` run asks about are those of the chosen prompts. Twin: of the own one."""
    found = tuner(online=sa.Online(rounds=(8,), members=2, hidden=4))
    biased(found.model, [0.0, 0.0, 0.0, 40.0])
    prompt = torch.zeros(400, dtype=torch.long)
    noise = RowNoise(1, torch.arange(400))
    asked = found.collector.samples(found.learner, prompt, noise)
    plain = sa.sample(found.model, n=400, steps=24, seed=1, reference=True)
    told = sa.sample(found.model, n=400, steps=24, seed=1)
    close(asked.mean(), told.mean(), atol=1e-5, plain=plain.mean())


def test_below_a_time_the_prompt_itself_is_told():
    """The decision is at 0.1925, so there is none. Twin: the text of the menu to the end."""
    made = biased(tuner().model, [0.0, 0.0, 0.0, 40.0])
    draw = partial(sa.sample, made, n=2000, steps=24, seed=1)
    told = draw()
    made.off_below = 0.195
    same(draw(), draw(reference=True), told=told)
