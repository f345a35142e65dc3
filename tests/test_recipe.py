"""Recipes: the order of defaults, files and overrides, and that whatever is wrong is one line that names its key."""

from __future__ import annotations

import math
import re
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import yaml
from twins import accepts, close, same

from scoreaction import catalog
from scoreaction.errors import UserError
from scoreaction.models import gaussian_mixture
from scoreaction.recipes.build import build
from scoreaction.recipes.prompts import prompt_list
from scoreaction.recipes.recipe import Recipe, dump, load_recipe, resolve
from scoreaction.rewards._weighted import WeightedSum
from scoreaction.training.optimizer import Train
from scoreaction.yaml_text import parse_yaml

SMALL = {
    "model": {"name": "gaussian_mixture"},
    "reward": {"name": "linear", "direction": [1.0, 0.5]},
    "algorithm": {"name": "ddpo"},
}


def fault(*overrides: str, recipe: str = "mixture") -> str:
    """The one line that a recipe is refused with."""
    with pytest.raises(UserError) as caught:
        load_recipe(recipe, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", catalog.recipes())
def test_a_shipped_recipe_loads_and_its_dump_is_itself(name: str) -> None:
    recipe = load_recipe(name)
    again = resolve(parse_yaml(dump(recipe), where="dump"))
    same(again, recipe, other_seed=load_recipe(name, ["train.seed=7"]))


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux"])
def test_the_command_in_a_recipes_header_says_all_that_it_lacks(name: str) -> None:
    """Truth: what its rewards refuse to be without, but for what the hub has. Twin: the command without its settings."""
    header = (files("scoreaction") / "recipes" / f"{name}.yaml").read_text().split("model:")[0]
    said = re.findall(rf"#   scoreaction train {name} ?(\S*=\S*)?", header)

    def lacks_nothing(overrides: list[str]) -> None:
        config = load_recipe(name, overrides).reward.config
        assert not [key for key in ("head", "path") if getattr(config, key, "") is None]

    accepts(lacks_nothing, [text for text in said[:1] if text], **({"without_its_settings": []} if said[0] else {}))


def test_weights_that_a_reward_lacks_are_named_before_the_model_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scoreaction.recipes.build.build_model", lambda recipe: pytest.fail("it fetched the model"))
    with pytest.raises(UserError, match="reward.head: LAION's head is not shipped"):
        build(load_recipe("sd15"))


def test_each_layer_covers_the_one_below(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    default, model = Train(), gaussian_mixture.DEFAULTS
    close(load_recipe(str(path)).train.lr, model["train"]["lr"], atol=0, default=default.lr)
    close(
        load_recipe(str(path)).evaluation.steps, model["evaluation"]["steps"], atol=0, of_the_training=model["sampler"]["steps"]
    )
    path.write_text(yaml.safe_dump({**SMALL, "train": {"lr": 0.5, "seed": 3}}))
    close(load_recipe(str(path)).train.lr, 0.5, atol=0, of_the_model=model["train"]["lr"])
    assert load_recipe(str(path)).train.iterations == model["train"]["iterations"], "a given block keeps the other defaults"
    close(load_recipe(str(path), ["train.lr=0.25"]).train.lr, 0.25, atol=0, of_the_file=0.5)
    close(load_recipe(str(path), ["train.lr=0.25"]).train.seed, 3, atol=0, block_replaced=default.seed)


def test_numbers_mean_what_they_look_like() -> None:
    close(load_recipe("mixture", ["train.lr=1e-3"]).train.lr, 1e-3, written_as_text=1.0)
    close(load_recipe("mixture", ["train.lr=1.0e-3"]).train.lr, 1e-3, written_as_text=1.0)
    assert load_recipe("mixture", ["train.lr=1"]).train.lr == 1.0
    assert load_recipe("mixture", ["model.means=[[1, 2], [3, 4]]", "model.weights=null"]).model.config.model_dump()[
        "means"
    ] == [
        [1.0, 2.0],
        [3.0, 4.0],
    ]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("algorithm.bata=1", "algorithm.bata: unknown key; did you mean beta?"),
        ("trian.lr=1", "trian: unknown key; did you mean train?"),
        ("lr=1", "lr: unknown key; did you mean train.lr?"),
        ("beta=1", "beta: unknown key; did you mean algorithm.beta?"),
        ("reward.directoin=[1, 0]", "reward.directoin: unknown key; did you mean direction?"),
        ("evaluation.held_out=[{name: linear, direction: [1, 0], scal: 2}]", "evaluation.held_out.0.scal: unknown key"),
        ("algorithm.beta=-1", "algorithm.beta: must be greater than 0 (got -1)"),
        ("algorithm.beta=.nan", "algorithm.beta: must be a finite number (got nan)"),
        ("algorithm.beta=.inf", "algorithm.beta: must be a finite number (got inf)"),
        ("algorithm.beta=true", "algorithm.beta: must be a valid number (got True)"),
        ("algorithm.beta='0.5'", "algorithm.beta: must be a valid number (got '0.5')"),
        ("algorithm.beta=", "algorithm.beta: must be a valid number (got None)"),
        ("train.iterations=true", "train.iterations: must be a valid integer (got True)"),
        ("train.iterations=2.5", "train.iterations: must be a valid integer"),
        ("train.iterations=0", "train.iterations: must be greater than or equal to 1 (got 0)"),
        ("train.ema=1", "train.ema: must be a valid boolean (got 1)"),
        ("sampler.eta=1.5", "sampler.eta: must be less than or equal to 1 (got 1.5)"),
        ("sampler.solver=dimm", "sampler.solver: must be 'ddim'"),
        ("model.means=[[1, 2], [3]]", "model.means: must be"),
        ("model.weights=[1, 2]", "model.weights: must be 4 positive numbers, one for each of the means"),
        ("model={name: linear_quadratic, mean: []}", "model.mean: must have at least 1 item (got [])"),
        ("model.std=[1, 2]", "model.std: must be positive, one number or 4 of them"),
        (
            "model={name: linear_quadratic, mean: [0, 1], variance: [1, 2, 3]}",
            "model.variance: must be positive, one number or 2",
        ),
        ("reward={name: quadratic, center: [1, 0], curvature: [[1]]}", "reward.curvature: must be a number or a matrix 2 x 2"),
        ("reward={name: quadratic, center: [1, 0], linear: [1]}", "reward.linear: must have 2 numbers"),
        (
            "early_stop={metric: rewad_mean}",
            "early_stop.metric: no metric 'rewad_mean'; choose from reward_mean, diversity, vendi",
        ),
        ("early_stop={metric: held_out.ink}", "early_stop.metric: no metric 'held_out.ink'"),
        ("train.select=held_out.ink", "train.select: no metric 'held_out.ink'"),
        ("model.means=[[1, x], [3, 4]]", "model.means.0.1: must be a valid number (got 'x')"),
        ("model.means=[[1", "model.means line 1: not valid YAML"),
        ("algorithm.name=ddop", "algorithm.name: unknown algorithm 'ddop'; did you mean ddpo or ddpp?"),
        ("algorithm.name=_learner", "algorithm.name: unknown algorithm '_learner'"),
        ("algorithm.name=3", "algorithm.name: must be a name (got 3)"),
        ("model.name=no_such.module", "model.name: no module 'no_such'"),
        ("model.name=yaml.nodes", "model.name: yaml.nodes has no Config"),
        ("algorithm.beta.x=1", "algorithm.beta.x: algorithm.beta is 0.5, which has no keys"),
        ("algorithm", "algorithm: an override is key=value"),
        ("=3", "=3: an override is key=value"),
        ("reward=", "reward: is required"),
        ("reward=[]", "reward: must be a list of rewards"),
        ("reward=[{name: linear, direction: [1, 0], weight: x}]", "reward.0.weight: must be a valid number"),
        ("reward.weight=2", "reward.weight: a single reward has no weight"),
        ("reward.direction=null", "reward.direction: must be a valid array"),
        ("train=3", "train: must be a mapping"),
        ("prompts=animlas", "prompts: 'animlas' is neither a shipped set nor a text file"),
        ("prompts=[]", "prompts: must be null"),
        ("prompts=[true]", "prompts.0: must be a text"),
        ("early_stop.patience=0", "early_stop.patience: must be greater than or equal to 1"),
    ],
)
def test_a_wrong_override_is_one_line_that_names_the_key(override: str, said: str) -> None:
    assert fault(override).startswith(said)


def test_the_right_twins_of_wrong_overrides_pass() -> None:
    right = ["algorithm.beta=1", "train.lr=1", "train.iterations=2", "train.ema=true", "sampler.eta=0.5", "reward.scale=2"]
    assert isinstance(load_recipe("mixture", right), Recipe)
    held_out = "evaluation.held_out=[{name: linear, direction: [1, 0]}]"
    stop = load_recipe("mixture", [held_out, "early_stop={metric: held_out.linear}", "train.select=held_out.linear"]).early_stop
    assert stop is not None
    assert stop.metric == "held_out.linear"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: {name: gaussian_mixture", "not valid YAML"),
        ("a: 1\nb: [\n", "line 3"),
        ("model: 1\nmodel: 2\n", "line 2: not valid YAML: model is given twice"),
        ("- a list", "a recipe is a mapping"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
        ("reward: {name: linear}", "model: is required"),
        ("model: {name: gaussian_mixture}\nreward: {name: linear}\nalgorithm: {name: ddpo}", "reward.direction: is required"),
        ("", "a recipe is a mapping"),
    ],
)
def test_a_wrong_file_is_one_line(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert said in fault(recipe=str(path))


def test_a_missing_file_is_named_and_a_misspelt_recipe_corrected(tmp_path: Path) -> None:
    assert fault(recipe="mixtrue") == "mixtrue: no such recipe; did you mean mixture?"
    assert fault(recipe=str(tmp_path / "none.yaml")).startswith(str(tmp_path / "none.yaml"))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "is not UTF-8 text" in fault(recipe=str(tmp_path / "binary.yaml"))


def test_a_new_name_for_a_misspelt_one_keeps_its_settings(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    reward = "reward: {name: linear, direction: [1.0, 0.0]}"
    path.write_text(f"model: {{name: gaussian_mixture}}\n{reward}\nalgorithm: {{name: dpko, beta: 0.25}}\n")
    assert load_recipe(str(path), ["algorithm.name=dpok"]).algorithm.dump()["beta"] == 0.25
    assert fault(recipe=str(path)).startswith("algorithm.name: unknown algorithm 'dpko'")


def test_a_new_name_drops_what_only_the_file_said() -> None:
    assert "beta" not in load_recipe("mixture", ["algorithm.name=ddpo"]).algorithm.dump(), "the file's beta is not DDPO's"
    assert load_recipe("mixture", ["algorithm.name=dpok"]).algorithm.dump()["beta"] == 0.5, "DPOK knows the file's beta"
    assert load_recipe("shapes", []).algorithm.dump()["estimator"] == "forward"
    assert load_recipe("shapes", ["algorithm.name=ddpo"]).algorithm.dump()["estimator"] == "ppo", "another kind of estimator"
    assert fault("algorithm.name=ddpo", "algorithm.trust=1") == fault("algorithm.trust=1", "algorithm.name=ddpo")
    assert fault("algorithm.name=ddpo", "algorithm.trust=1").startswith("algorithm.trust: unknown key")


def test_weighted_rewards_are_summed() -> None:
    rewards = "reward=[{name: linear, direction: [1, 0], weight: 2}, {name: quadratic, center: [0, 0], weight: 3}]"
    reward = build(load_recipe("mixture", [rewards])).reward.reward
    assert isinstance(reward, WeightedSum)
    assert reward.differentiable
    x = torch.tensor([[1.0, 2.0]])
    close(reward(x, None), 2 * 1.0 + 3 * -2.5, mean_instead=(2 * 1.0 + 3 * -2.5) / 2, unweighted=1.0 - 2.5)


def test_prompts_come_from_a_set_a_file_or_a_list(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("3\n\n seven \n")
    (tmp_path / "empty.txt").write_text("\n")
    assert load_recipe("digits", [f"prompts={tmp_path}/mine.txt"]).prompts == ["3", "seven"]
    assert load_recipe("digits", ["prompts=[1, two]"]).prompts == ["1", "two"]
    assert len(prompt_list(load_recipe("digits").prompts) or []) == 10
    assert "holds no prompt" in fault(f"prompts={tmp_path}/empty.txt", recipe="digits")


def test_a_dotted_path_reaches_a_users_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "upside.py").write_text(
        "from pydantic import BaseModel\n"
        "class Config(BaseModel, extra='forbid'):\n    factor: float = 1.0\n"
        "class Up:\n    differentiable = False\n"
        "    def __init__(self, factor): self.factor = factor\n"
        "    def __call__(self, samples, prompts): return self.factor * samples[:, 1]\n"
        "def build(config): return Up(config.factor)\n"
    )
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("mixture", ["reward={name: mine.upside, factor: 3}"])
    assert recipe.reward.dump() == {"name": "mine.upside", "factor": 3.0}  # type: ignore[union-attr]
    assert build(recipe).reward.reward(torch.ones(1, 2), None).tolist() == [3.0]
    assert fault("reward={name: mine.upside, facto: 3}") == "reward.facto: unknown key; did you mean factor?"
    assert fault("reward={name: mine.downside}").startswith("reward.name: no module 'mine.downside'")
    (tmp_path / "mine" / "broken.py").write_text("1 / 0\n")
    assert (
        fault("reward={name: mine.broken}") == "reward.name: importing mine.broken raised ZeroDivisionError: division by zero"
    )
    (tmp_path / "mine" / "late.py").write_text("from mine.upside import Config\ndef build(config): 1 / 0\n")
    with pytest.raises(UserError, match=r"reward: build of mine\.late raised ZeroDivisionError"):
        build(load_recipe("mixture", ["reward={name: mine.late}"]))


@pytest.mark.parametrize("recipe", ["digits", "shapes", "mixture"])
def test_an_algorithm_that_has_no_kl_as_published_gets_none_from_model_or_recipe(recipe: str) -> None:
    """Only where it is asked for; the optimum that it is measured against stays the recipe's."""
    others = load_recipe(recipe).algorithm.config.beta
    for name in ("draft", "refl"):
        for changes in ([f"algorithm.name={name}"], [f"algorithm={{name: {name}}}"]):
            found = load_recipe(recipe, [*changes, "reward={name: linear, direction: [1, 0]}"])
            same(found.algorithm.config.beta, 0.0, of_model_or_recipe=others)
            asked = load_recipe(recipe, [*changes, "reward={name: linear, direction: [1, 0]}", "algorithm.beta=0.3"])
            same(asked.algorithm.config.beta, 0.3, published=0.0)
    same(load_recipe(recipe, ["algorithm.name=dpok"]).algorithm.config.beta, others, published=1.0)


def test_an_algorithm_without_beta_is_held_to_the_recipes_optimum(tmp_path: Path) -> None:
    def beta(*overrides: str) -> float | None:
        return load_recipe("mixture", overrides).evaluation.beta

    same(beta("algorithm.name=ddpo"), 0.5, with_its_own=beta("algorithm.name=dpok"))
    same(beta("algorithm.name=ddpo", "evaluation.beta=0.2"), 0.2, of_the_recipe=beta("algorithm.name=ddpo"))
    values = load_recipe("mixture", ["algorithm={name: draft, beta: 0}"]).values()
    (tmp_path / "free.yaml").write_text(yaml.safe_dump(values))
    assert load_recipe(str(tmp_path / "free.yaml"), ["algorithm.name=ddpo"]).evaluation.beta is None


def test_a_text_that_looks_like_a_number_stays_one() -> None:
    recipe = load_recipe("digits", ['prompts=["1e5", "7"]'])
    found = resolve(parse_yaml(dump(recipe), where="dump")).prompts
    same(found, ["1e5", "7"], dumped_by_yaml_alone=parse_yaml(yaml.safe_dump(["1e5", "7"]), where="twin"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["reward.direction=[1]"], r"^reward.direction: must have 2 numbers, one for each dimension \(got 1\)"),
        (["reward={name: quadratic, center: [1, 2, 3]}"], "^reward.center: must have 2 numbers"),
        (["reward=[{name: linear, direction: [1, 0]}, {name: linear, direction: [1]}]"], "^reward.1.direction: must have 2"),
        (["evaluation.held_out=[{name: linear, direction: [1]}]"], "^evaluation.held_out.0.direction: must have 2 numbers"),
        (
            ["evaluation.held_out=[{name: ink}]"],
            "^evaluation.held_out.0: ink does not fit the model gaussian_mixture: ",
        ),
        (["model={name: digits, path: /nowhere}"], "^model.path: /nowhere is no folder with the digits"),
        (["prompts=[cat]"], "prompts: the model gaussian_mixture takes no prompts"),
        (["sampler.solver=heun"], "sampler.solver: heun takes eta"),
        (["train.device=gpux"], "train.device: 'gpux' cannot be used here"),
        (["algorithm={name: scoreaction.rewards.ink}"], "must derive from scoreaction.algorithms.Algorithm"),
        (["sampler.eta=0", "algorithm.name=ddpo"], "sampler.eta: ddpo needs densities"),
    ],
)
def test_parts_that_do_not_fit_are_refused_when_built(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        build(load_recipe("mixture", overrides))


def test_a_run_begins_the_same_whatever_was_drawn_before() -> None:
    def weights(*overrides: str) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in build(load_recipe("mixture", overrides)).model.parameters.values()])

    first = weights()
    torch.randn(3)
    same(weights(), first, other_seed=weights("train.seed=1"))
    assert not math.isclose(float(torch.randn(1)), float(torch.randn(1))), "the caller's own randomness goes on"


def test_a_key_that_is_a_list_is_no_recipe(tmp_path):
    (tmp_path / "odd.yaml").write_text("? [a, b]\n: 1\n")
    with pytest.raises(UserError, match=r"odd.yaml.*not valid YAML"):
        load_recipe(str(tmp_path / "odd.yaml"))


def test_a_recipe_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(SMALL), encoding="utf-8-sig")
    same(load_recipe(str(tmp_path / "mine.yaml")), resolve(SMALL), another=load_recipe("mixture"))


def test_a_path_that_is_here_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a run finds it from any folder; an id of the hub, and what is absolute, stay. Twin: from another folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "head.safetensors").touch()
    (tmp_path / "part.npz").touch()
    overrides = [
        "reward={name: aesthetic, head: head.safetensors, path: openai/clip}",
        "model={name: digits, path: weights}",
        "steer.known.values=part.npz",
    ]

    def paths() -> list[str]:
        values = load_recipe("digits", overrides).values()
        known = values["steer"]["known"]["values"]
        return [values["reward"]["head"], values["reward"]["path"], values["model"]["path"], known]

    found = paths()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    here = [f"{tmp_path}/{name}" for name in ("head.safetensors", "weights", "part.npz")]
    same(found, [here[0], "openai/clip", *here[1:]], elsewhere=paths())
    with pytest.raises(
        UserError, match=rf"^model\.path: no/such/folder is no folder .*\(a relative path begins at {Path.cwd()}\)$"
    ):
        build(load_recipe("digits", ["model={name: digits, path: no/such/folder}"]))


@pytest.mark.parametrize(("prompts", "each", "learns"), [(10, 1, False), (10, 2, True), (4, 1, True), (5, 1, False)], ids=str)
def test_groups_of_one_are_refused(prompts: int, each: int, learns: bool) -> None:
    """A batch of 8: GRPO needs two of a prompt. Twins: more samples of a prompt, fewer prompts."""
    texts = [str(digit) for digit in range(prompts)]
    overrides = ["algorithm={name: ddpo, baseline: group}", "train.batch=8", f"train.samples_per_prompt={each}"]
    recipe = load_recipe("digits", [*overrides, f"prompts={texts}", "evaluation.held_out=[]", "train.select=null"])
    if learns:
        build(recipe)
        return
    with pytest.raises(UserError, match=r"^train\.samples_per_prompt: algorithm\.baseline group .*; set it to 2 or more, or"):
        build(recipe)
