"""The tests of tests/apart, each with packages that the suite itself cannot hold; `make` puts those beside its environment."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.long
@pytest.mark.parametrize(
    ("file", "packages"),
    [
        ("hpsv2", "open_clip"),
        ("imagereward", "image_reward"),
        ("adam8bit", "bitsandbytes"),
        ("quantised", "bitsandbytes"),
        ("ocr", "rapidocr"),
    ],
)
def test_with_packages_of_its_own(file: str, packages: str) -> None:
    folder = Path(sys.prefix) / "apart" / packages
    if not folder.is_dir():
        pytest.skip(f"make {folder} installs what it needs")
    path = os.pathsep.join(map(str, (folder, HERE)))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "apart" / f"{file}.py")]
    run = subprocess.run(
        command,
        cwd=HERE.parent,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout
