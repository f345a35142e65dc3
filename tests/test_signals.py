"""Truth: what a signal leaves on stderr and on the disk: whoever asks a run to stop is answered at once."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from commanding import TINY, Stop
from twins import accepts, same

from scoreaction.cli import main
from scoreaction.commands.distill import distill_recipe
from scoreaction.commands.signals import ASKING, Signals, heard
from scoreaction.errors import Interrupted
from scoreaction.recipes.recipe import load_recipe
from scoreaction.training.distillation import Distiller

COMMAND = ["train", "mixture", *TINY, "train.iterations=4"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_is_answered_at_once_with_what_it_waits_for(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    """Before the iteration ends; twin: nothing, which is what a second hangup says."""

    def said(times: int) -> str:
        with Signals(waiting="iteration 7 of 300") as signals:
            for _ in range(times):
                signals._receive(signal.SIGHUP if times > 1 else number, None)
        return capfd.readouterr().err

    line = f"{number.name}: stopping after iteration 7 of 300, which is then saved; Ctrl-C stops at once\n"
    same(said(1), line, nothing="")
    assert said(2).count("\n") == 1


def test_a_run_says_which_iteration_it_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    Stop(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGHUP))
    assert main([*COMMAND, "--output", str(tmp_path / "run")]) == 130

    def check(text: str) -> None:
        first, *_, second = ["", *text.splitlines()][-2:]
        assert first.startswith("SIGHUP: stopping after iteration 2 of 4, which is then saved")
        assert second.startswith("stopped after iteration 2, state saved; go on with: scoreaction train")

    text = capfd.readouterr().err
    accepts(check, text, only_in_the_end=text.partition("\n")[2])
    assert (tmp_path / "run" / "checkpoints" / "000002").is_dir()


def test_a_lost_terminal_takes_the_answer_without_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twin: a write to it, which fails."""
    reader, writer = os.pipe()
    os.close(reader)
    saved = os.dup(2)
    os.dup2(writer, 2)
    try:
        with Signals() as signals:
            signals._receive(signal.SIGHUP, None)
            assert signals.requested
        with pytest.raises(BrokenPipeError):
            os.write(2, b"x")
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(writer)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_distilling_is_interrupted_by_every_signal(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by Ctrl-C; before it and after it the process's own handlers are there."""
    before = signal.getsignal(number)
    backward = Distiller._backward

    def struck(distiller: Distiller, *given: object) -> float:
        os.kill(os.getpid(), number)
        time.sleep(0.01)
        return backward(distiller, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(Distiller, "_backward", struck)
    recipe = load_recipe("mixture", ["distill.iterations=3", "model.hidden=8"])
    with pytest.raises(Interrupted, match="stopped while distilling; nothing was written"):
        distill_recipe(recipe, tmp_path / "out")
    assert signal.getsignal(number) == before


def test_a_signal_that_the_shell_ignores_is_left_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        ignored = heard()
    finally:
        signal.signal(signal.SIGHUP, before)
    same(signal.SIGHUP in ignored, False, otherwise=signal.SIGHUP in heard())
    assert signal.SIGHUP in ASKING
