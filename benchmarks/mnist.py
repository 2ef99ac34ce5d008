"""Where the benchmarks find MNIST: beside the repository, or on the Hub."""

from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
LOCAL = ROOT.parent / "shared" / "data" / "mnist"
MNIST = str(LOCAL) if LOCAL.is_dir() else "ylecun/mnist"
