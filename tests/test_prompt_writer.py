"""Truth: the writer in process, and the samples that `sa.sample` draws; what is written is kept, and not asked for again."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from prompt_line import PROMPTS, model, tuner
from servers import pretending, writing
from test_serve_reward import GOOD, post, question
from twins import accepts, same

import scoreaction as sa
from scoreaction.algorithms.prompt_loop import TEMPLATES
from scoreaction.cli import main
from scoreaction.errors import UserError
from scoreaction.recipes.build import build
from scoreaction.recipes.recipe import load_recipe
from scoreaction.rewards import RewardError, _wire
from scoreaction.yaml_text import parse_yaml

SAMPLER = sa.Sampler(steps=4)
SMALL = [
    "algorithm={name: prompt_loop, at: [1, 0.5], hidden: 8}", "prompts=['3', '7']", "train.batch=8", "train.iterations=1",
    "sampler.steps=4", "evaluation.n=8", "evaluation.steps=3", "evaluation.held_out=[]",
]  # fmt: skip


def by_sample(samples: torch.Tensor, prompts: list[str], n: int) -> list[list[str]]:
    """Texts that tell what was seen: the sample's number, and one more for each text."""
    return [[f"{float(x.sum()) + i:.4f}" for i in range(1, n + 1)] for x in samples.flatten(1)]


def digits(samples: torch.Tensor, prompts: list[str], n: int) -> list[list[str]]:
    return [[str((int(prompt) + i) % 10) for i in range(1, n + 1)] for prompt in prompts]


def over_http(writer: Any, prompts: list[Any], seed: int = 0, **settings: Any) -> dict[str, list[str]]:
    with writing(writer) as server:
        return sa.write_menu(model(), sa.Writer(url=server.url, **settings), prompts, sampler=SAMPLER, seed=seed)


def test_a_server_writes_what_its_function_does() -> None:
    """Texts are of the picture that is drawn of each prompt. Twins: of other noise, and of the prompts in another order."""
    here = sa.write_menu(model(), by_sample, PROMPTS, texts=3, sampler=SAMPLER)
    drawn = sa.sample(model(), n=4, steps=4, seed=0, prompts=PROMPTS, reference=True)
    truth = {p: [p, *own] for p, own in zip(PROMPTS, by_sample(drawn, PROMPTS, 3), strict=True)}
    turned = {p: [p, *own] for p, own in zip(PROMPTS, by_sample(drawn.flip(0), PROMPTS, 3), strict=True)}
    other = over_http(by_sample, PROMPTS, seed=1, texts=3)
    same(here, truth, turned=turned, other_noise=other)
    same(over_http(by_sample, PROMPTS, texts=3, batch=2), truth, turned=turned, other_noise=other)


def test_a_writer_is_asked_once_for_each_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many prompts go in parts, a prompt that comes twice once, with what a file says beside it. Twin: every row asked."""
    seen: list[tuple[str, Any]] = []

    def writer(samples: torch.Tensor, prompts: list[Any], n: int) -> list[list[str]]:
        assert len(samples) == len(prompts) <= 2
        seen.extend((str(prompt), getattr(prompt, "metadata", {})) for prompt in prompts)
        return by_sample(samples, prompts, n)

    monkeypatch.setattr("scoreaction.algorithms._writer.PART", 2)
    prompts = [sa.Prompt(PROMPTS[0], metadata={"count": 2}), PROMPTS[1], PROMPTS[0], PROMPTS[2]]
    menu = sa.write_menu(model(), writer, prompts, sampler=SAMPLER)
    same(list(menu), PROMPTS[:3], all=[*map(str, prompts)])
    truth = [(PROMPTS[0], {"count": 2}), (PROMPTS[1], {}), (PROMPTS[2], {})]
    same(seen, truth, every_row=[*truth, truth[0]])
    seen.clear()
    over_http(writer, prompts, batch=2, in_flight=1)
    assert sorted(seen, key=str) == sorted(truth, key=str)


BAD = {
    "[]": r"texts must be 2 lists, one a prompt \(got 0\)",
    '"8"': r"texts must be 2 lists, one a prompt \(got str\)",
    '[["8"], ["1"]]': r"texts must be 2 for '3' \(got 1\)",
    '["89", "12"]': r"texts must be 2 for '3' \(got str\)",
    '[["8", 9], ["1", "2"]]': "a text for '3' is of type int",
    '[["8", " "], ["1", "2"]]': "a text for '3' is empty",
    '[["8", "9"], ["1", "1"]]': "the text '1' for '7' comes twice; write another",
    '[["8", "3"], ["1", "2"]]': "a text for '3' is the prompt itself, which a menu has in any case; write another",
    f'[["8", "{"9" * 2001}"], ["1", "2"]]': "a text for '3' has 2,001 characters, 2,000 at most",
    r'[["8", "\ud800"], ["1", "2"]]': "a text for '3' holds half a character",
    r'[["8", "1\u0085"], ["1", "2"]]': "a text for '3' holds a line break or another control character",
}


@pytest.mark.parametrize("texts", BAD)
def test_a_bad_answer_ends_the_command_in_one_line(texts: str, refused: Any, tmp_path: Path) -> None:
    """Twin: the next test, where the answer is good. The same is refused in process, and nothing is written."""
    with pretending(lambda i, body: (200, f'{{"texts": {texts}}}'.encode())) as url:
        setting = f"algorithm.writer={{url: '{url}', texts: 2}}"
        said = refused("train", "digits", *SMALL, setting, "--output", tmp_path / "run")
    assert re.search(f"algorithm.writer: {url}: {BAD[texts]}$", said), said
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=BAD[texts]):
        _wire.checked_texts(json.loads(texts), ["3", "7"], 2)


def test_what_does_not_fit_or_answer_is_one_line(refused: Any, tmp_path: Path) -> None:
    def said(setting: str) -> str:
        return refused("train", "digits", *SMALL, setting, "--output", tmp_path / "run")

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    down = said(f"algorithm.writer={{url: '{url}', retries: 1, backoff: 0.01}}")
    assert f"algorithm.writer: {url}: no answer (connection refused) after 2 tries; is it running, and is url right?" in down
    assert "algorithm.writer.url: must be like http://127.0.0.1:8765" in said("algorithm.writer={url: 'nowhere'}")
    assert "algorithm.writer.texts: must be greater than or equal to 1" in said("algorithm.writer={texts: 0}")
    assert "algorithm.writer.text: unknown key; did you mean texts?" in said("algorithm.writer={text: 3}")
    both = said("algorithm={name: prompt_loop, menu: ['{prompt}', 'a {prompt}'], writer: {texts: 2}}")
    assert "algorithm.writer: there is a menu, so that nobody would be asked; set algorithm.menu=null" in both
    few = "algorithm={name: prompt_loop, weights: [1, 1], writer: {texts: 2}}"
    assert "algorithm.weights: give a number above 0 for each of the menu's 3 entries" in said(few)
    with writing(lambda samples, prompts, n: [["9"]] * len(prompts)) as server:
        assert "tested: texts must be 2 for '3' (got 1) (HTTP 422)" in said(
            f"algorithm.writer={{url: '{server.url}', texts: 2}}"
        )
    with writing(lambda samples, prompts, n: [["a dog", "8"]] * len(prompts)) as server:
        assert "algorithm.writer: prompts: prompt 'a dog' names no digit" in said(
            f"algorithm.writer={{url: '{server.url}', texts: 2}}"
        )
    with pretending(lambda i, body: (200, b'{"scores": [1, 2]}')) as url:
        assert "texts must be 2 lists, one a prompt (got NoneType)" in said(f"algorithm.writer={{url: '{url}'}}")
    assert not (tmp_path / "run").exists()


def test_a_writers_server_refuses_what_a_rewards_does() -> None:
    """The same limits, tokens and pages; twins: what it answers."""
    good = question(GOOD, prompts=["a", "b"], texts=1)
    fails: dict[str, Any] = {"raises": None}

    def writer(samples: torch.Tensor, prompts: list[str], n: int) -> Any:
        if "dtype" in fails:
            torch.set_default_dtype(fails["dtype"])
        if fails["raises"]:
            raise fails["raises"]
        return [[f"{prompt}!"] for prompt in prompts]

    right = {"Authorization": "Bearer t"}
    with writing(writer, token="t", max_images=2) as server:

        def ask(body: bytes = good, path: str = "/write", **headers: str) -> tuple[int, str]:
            return post(server, body, path=path, headers={**right, **headers})

        accepts(_fine, ask(), no_token=ask(Authorization="Bearer x"), page=ask(Origin="http://evil.example"))
        assert ask(path="/score") == (404, "GET /health, or POST /write")
        assert ask(question(GOOD, prompts=["a", "b"]))[1].startswith("texts must be a number from 1 to 64")
        assert ask(question(GOOD, prompts=["a", "b"], texts=65))[0] == 400
        assert ask(question(GOOD, texts=1))[1].startswith("prompts must be texts")
        assert ask(question(GOOD, prompts=["a"], texts=1))[0] == 400
        assert ask(question(GOOD, prompts=["a", "a!"], texts=1, other=1))[0] == 400
        fails["raises"] = SystemExit("no more\nwords")
        assert ask() == (422, "tested: raised SystemExit: no more words")
        before = torch.get_default_dtype()
        fails |= {"raises": None, "dtype": torch.float16}
        assert ask()[1].startswith(f"tested: changes torch's default dtype from {before} to torch.float16")
        assert torch.get_default_dtype() == before
        del fails["dtype"]
        health = server.service.health()
    same(
        health,
        {"status": "ok", "writer": "tested", "max_images": 2, "max_bytes": 2**20, "scored": 6},
        idle={**health, "scored": 0},
    )
    fails["raises"] = None
    with writing(writer) as server:
        asked = [post(server, good, path="/write", headers={"Host": host}) for host in ("localhost", "evil.example")]
        accepts(_fine, asked[0], rebound=asked[1])


def _fine(said: tuple[int, str]) -> None:
    assert said == (200, "")


@pytest.mark.long
def test_a_run_keeps_its_menu_and_asks_no_more(tmp_path: Path) -> None:
    """Resumed, drawn from, measured and loaded without a server. Twin: a run that has not begun needs one."""
    folder = tmp_path / "run"
    with writing(digits) as server:
        asks = f"algorithm.writer={{url: '{server.url}', texts: 2, retries: 0}}"
        assert main(["train", "digits", *SMALL, asks, "--output", str(folder)]) == 0
        assert server.service.served.rows == 2
    truth = {"3": ["3", "4", "5"], "7": ["7", "8", "9"]}
    saved = parse_yaml((folder / "recipe.yaml").read_text(), where="here")["algorithm"]
    same(saved["menu"], truth, template=["{prompt}"])
    assert saved["writer"] is None
    again = ["train", "digits", *SMALL, asks, "train.iterations=2", "--output"]
    assert main([*again, str(folder), "--resume"]) == 0
    assert main(["evaluate", str(folder), "--steps", "3", "--n", "4"]) == 0
    assert main(["sample", str(folder), "--n", "4"]) == 0
    chooser = sa.load(folder).chooser
    assert chooser is not None
    same(chooser.menu.entries, truth, template=["{prompt}"])
    assert main([*again, str(tmp_path / "other")]) == 2
    other = asks.replace("texts: 2", "texts: 3")
    assert main(["train", "digits", *SMALL, other, "train.iterations=3", "--output", str(folder), "--resume"]) == 2
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2


def test_a_menu_is_kept_before_anything_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that fails in its first iteration goes on without the server. Twin: another folder, which needs it."""

    def failing(self: sa.Finetuner) -> None:
        raise RuntimeError("no room")

    with writing(digits) as server, monkeypatch.context() as patched:
        command = ["train", "digits", *SMALL, f"algorithm.writer={{url: '{server.url}', texts: 2, retries: 0}}", "--output"]
        patched.setattr(sa.Finetuner, "_iterate", failing)
        assert main([*command, str(tmp_path / "run")]) == 1
    ends = [main([*command, str(tmp_path / name), *more]) for name, more in (("run", ["--resume"]), ("other", []))]
    same(ends, [0, 2], asked_again=[2, 2])


def test_a_writer_in_python_is_settled_with_the_run() -> None:
    """The tuner's algorithm and chooser have the menu, the given one is as it was, and one with a menu asks for none."""
    with writing(lambda samples, prompts, n: [["0.5", "1.5"]] * len(prompts)) as server:
        given = sa.PromptLoop(writer=sa.Writer(url=server.url, texts=2), at=[0.2], hidden=8)
        found = tuner(algorithm=given)
        again = tuner(algorithm=found.algorithm)
        same(server.service.served.rows, 1, asked_again=2)
    own = PROMPTS[1]
    for one in (found, again):
        same(one.algorithm.menu, {own: [own, "0.5", "1.5"]}, none=None)  # type: ignore[attr-defined]
    assert given.menu is None
    assert found.model.chooser is not None
    assert found.model.chooser.menu.size == 3


def test_a_token_goes_to_no_writer_that_a_stranger_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of a menu that holds none hides nothing. Twins: no token, a writer of this machine, one that the user allows."""
    monkeypatch.setenv("SCOREACTION_TOKEN", "secret")

    def read(writer: str, *, trust: bool = False) -> str:
        algorithm = f"{{name: prompt_loop, {writer}}}"
        (tmp_path / "r.yaml").write_text(f"model: digits\nreward: ink\nalgorithm: {algorithm}\n")
        return load_recipe(str(tmp_path / "r.yaml"), trust=trust).algorithm.name

    far = "writer: {url: 'http://evil.example'}"
    with pytest.raises(UserError, match=r"^algorithm.writer.url: .* sent to http://evil.example; --trust"):
        read(far)
    (tmp_path / "menu.json").write_text("null")
    with pytest.raises(UserError, match=r"^algorithm.writer.url: .* sent to"):
        read(f"{far}, menu: {tmp_path / 'menu.json'}")
    allowed = [read(far, trust=True), read("writer: {url: 'http://127.0.0.1:1'}")]
    monkeypatch.delenv("SCOREACTION_TOKEN")
    same([*allowed, read(far)], ["prompt_loop"] * 3, refused=[])


def test_what_is_only_tried_asks_nobody(refused: Any) -> None:
    """Plans, the doctor and tries of a comparison have stand-ins of as many texts. Twin: a run with a folder, above."""
    settings = [*SMALL, "algorithm.writer={url: 'http://127.0.0.1:9', texts: 2, retries: 0}"]
    assert main(["plan", "digits", *settings]) == 0
    found = build(load_recipe("digits", settings))
    assert found.model.chooser is not None
    same(found.model.chooser.menu.entries, ["{prompt}"] * 3, shipped=TEMPLATES)
    next(iter(found))


WRITER = """
from pydantic import BaseModel

class Config(BaseModel, extra="forbid"):
    mark: str = "!"

def build(config):
    return lambda samples, prompts, n: [[prompt + config.mark * i for i in range(1, n + 1)] for prompt in prompts]
"""


def test_a_module_of_ones_own_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Any) -> None:
    """What `serve-writer` builds of a file and its settings. Twin: without the settings."""
    from scoreaction.recipes.build import build_writer

    (tmp_path / "writing_of_mine").mkdir()
    (tmp_path / "writing_of_mine" / "marks.py").write_text(WRITER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    texts = [build_writer("writing_of_mine.marks", more)(torch.zeros(1, 1), ["a"], 2) for more in (["mark=x"], [])]
    same(texts[0], [["ax", "axx"]], without=texts[1])
    assert "writer.name: unknown writer 'marks'" in refused("serve-writer", "marks")
    assert "writer.mrk: unknown key; did you mean mark?" in refused("serve-writer", "writing_of_mine.marks", "mrk=1")
    (tmp_path / "writing_of_mine" / "three.py").write_text(WRITER.partition("    return")[0] + "    return 3\n")
    assert "writer: build(config) of writing_of_mine.three must return a function (got int)" in refused(
        "serve-writer", "writing_of_mine.three"
    )
    assert "--host: 0.0.0.0 is reachable" in refused("serve-writer", "writing_of_mine.marks", "--host", "0.0.0.0")


def test_a_function_in_process_is_checked_as_a_server_is() -> None:
    with pytest.raises(ValueError, match=r"texts must be 4 for '-1.5' \(got 0\)"):
        sa.write_menu(model(), lambda samples, prompts, n: [[]] * len(prompts), PROMPTS, sampler=SAMPLER)
    with pytest.raises(RewardError, match="no answer"):
        sa.write_menu(model(), sa.Writer(url="http://127.0.0.1:9", retries=0), PROMPTS, sampler=SAMPLER)
