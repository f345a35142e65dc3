"""Fixtures of more than one file: a finished run, and a command that must fail. A file may have its own of the same name."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from commanding import train

from scoreaction.cli import main


def pytest_configure() -> None:
    """Lets a hangup end processes, as it does by default: a suite that runs under nohup would hand down that it is ignored."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has finished."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert train(folder) == 0
    return folder


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that must fail with this code and gives the one line it says on stderr."""

    def command(*arguments: object, code: int = 2) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == code
        said = capsys.readouterr().err
        assert said.count("\n") == 1, said
        assert "Traceback" not in said
        return said.strip()

    return command
