"""Fixtures shared by all tests."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest


if TYPE_CHECKING:
    from hub_server import HubServer


ROOT = Path(__file__).resolve().parents[1]
RECORDED = ROOT.parent / "shared"

# huggingface_hub reads its settings when it is first imported, so they are made here: the Hub of all tests of this
# worker is on this machine, and the user's cache and tokens are out of reach. It answers once a test asks for `hub`.
HUB_SOCKETS = tuple(socket.create_server(("127.0.0.1", 0), backlog=128) for _ in range(2))
HUB_HOME = tempfile.mkdtemp(prefix="hf_home_")
for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))] + ["TRANSFORMERS_OFFLINE"]:
    os.environ.pop(name, None)
os.environ.update(
    HF_ENDPOINT=f"http://127.0.0.1:{HUB_SOCKETS[0].getsockname()[1]}",
    HF_HOME=HUB_HOME,  # the cache, the token and the modules of remote code are below it
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    no_proxy="127.0.0.1",
)


def pytest_unconfigure():
    shutil.rmtree(HUB_HOME, ignore_errors=True)


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


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Torch computes on one thread, as in the demo: on several, sums have other last bits."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def fresh_python() -> Callable[..., subprocess.CompletedProcess]:
    """Runs code in a Python process of its own that can import this package: `fresh_python(code, cwd)`.

    It is offline; with HF_HUB_OFFLINE="0" it talks to `hub`.
    """

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


@pytest.fixture(scope="session")
def hub_server() -> "Iterator[HubServer]":
    """The Hub of this worker, for fixtures that outlive a test. Repositories stay: give them names of your own."""
    from hub_server import HubServer

    with HubServer(HUB_SOCKETS) as server:
        yield server


@pytest.fixture
def hub(hub_server) -> "HubServer":
    """The Hub of this worker, without faults and with an empty log."""
    hub_server.reset_faults()
    yield hub_server
    hub_server.reset_faults()


@pytest.fixture
def hub_token(hub_server, monkeypatch) -> str:
    """A token with which user `me` may write, set as HF_TOKEN."""
    token = hub_server.add_token("me", "write")
    monkeypatch.setenv("HF_TOKEN", token)
    return token
