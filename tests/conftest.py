"""Fixtures shared by all tests."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
RECORDED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Outputs recorded from the original codebases and the data sets; too large to live in the repository."""
    if not RECORDED.is_dir():
        pytest.skip("needs the recorded outputs of the original codebases in ../shared")
    return RECORDED


@pytest.fixture(scope="session")
def fresh_python() -> Callable[..., subprocess.CompletedProcess]:
    """Runs code in a Python process of its own, offline, that can import this package: `fresh_python(code, cwd)`."""

    def run(code: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
        defaults = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        process = subprocess.run(
            [sys.executable, "-c", code],
            cwd=cwd,
            env={**os.environ, **defaults, **environment},
            capture_output=True,
            text=True,
            timeout=240,
        )
        if process.returncode != 0:
            pytest.fail(f"the process failed:\n{process.stdout}{process.stderr}", pytrace=False)
        return process

    return run
