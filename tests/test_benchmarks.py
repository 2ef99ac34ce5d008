"""The commands in `benchmarks/` that make tables and pictures."""

import json
import subprocess
import sys

import models_table
import numpy as np
import pytest
import sample_grid
from PIL import Image
from sections import section, write_section


def test_a_section_is_replaced_or_added_and_the_rest_stays(tmp_path):
    path = tmp_path / "RESULTS.md"
    write_section(path, "mnist", "first", title="Results")
    write_section(path, "digits", r"| \1 |", title="Results")
    write_section(path, "mnist", "second", title="Results")
    assert section(path, "mnist") == "second" and section(path, "digits") == r"| \1 |"
    assert path.read_text().startswith("# Results\n\n<!-- mnist:start -->\nsecond\n<!-- mnist:end -->\n\n<!-- digits")
    with pytest.raises(ValueError, match="lacks the markers <!-- cifar10:start -->"):
        write_section(path, "cifar10", "")


def test_tables_of_the_readme_are_those_of_the_classes_and_cards(root):
    assert section(root / "README.md", "backbones") == models_table.backbones()
    assert section(root / "README.md", "trained") == models_table.trained_models()


def test_all_trained_models_are_drawn_side_by_side(root, tmp_path):
    models = sorted(str(path.parent) for path in (root / "model_cards").glob("*/model_index.json"))
    picture = tmp_path / "models.png"
    sample_grid.main(tuple(models), picture, class_labels=(3, 7), num_inference_steps=1)
    pixels = np.asarray(Image.open(picture))
    assert len(models) > 1 and pixels.shape[0] == sample_grid.HEADER + 64 * len(models)


@pytest.mark.slow
def test_backbones_are_trained_and_compared(root, tmp_path):
    def run() -> str:
        options = "--dataset digits --forward_tflops 1 --num_samples 40 --num_inference_steps 10 --rounds 1"
        command = [sys.executable, "benchmarks/backbones.py", *options.split()]
        paths = ["--output_dir", str(tmp_path / "runs"), "--results", str(tmp_path / "RESULTS.md")]
        return subprocess.run(command + paths, cwd=root, check=True, capture_output=True, text=True).stdout

    rows = [line.split(" | ") for line in run().splitlines() if line.startswith("| ")][1:]  # without the heading
    assert [row[0] for row in rows] == [
        "| dilated",
        "| composable-film",
        "| dit-gqa-adaln",
        "| dit-gqa-additive",
        "| ddpm",
        "| adm",
    ]
    flops = [float(row[3]) * int(row[4].replace(",", "")) for row in rows]
    assert max(flops) < 1.1 * min(flops)
    losses = {row[0]: float(row[7]) for row in rows}
    assert losses["| composable-film"] < 0.5  # of 1 when nothing is learned
    trained = (tmp_path / "runs" / "adm" / "config.json").stat().st_mtime
    result = json.loads((tmp_path / "runs" / "adm" / "result.json").read_text())
    assert result["test_loss"] == pytest.approx(losses["| adm"], abs=1e-4)
    assert "digits:start" in (tmp_path / "RESULTS.md").read_text()
    run()  # finds everything done
    assert (tmp_path / "runs" / "adm" / "config.json").stat().st_mtime == trained
