"""The commands in `benchmarks/` that make tables and pictures."""

import json
import subprocess
import sys
from dataclasses import replace

import classifier_quality
import demo_screenshots
import models_table
import numpy as np
import pytest
import sample_grid
import training_memory
from PIL import Image
from sections import section, write_section

from diffusers_ext.training.config import CLASSIFIER_PRESETS, UNET_PRESETS
from diffusers_ext.training.loop import train


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


def test_classifiers_of_one_training_are_compared(tmp_path):
    shape = {"block_out_channels": (8, 16), "attention_head_dim": 8, "train_batch_size": 4}
    unet = replace(UNET_PRESETS["digits"], **shape, max_train_steps=1, validation_images=1)
    train(replace(unet, validation_inference_steps=1, output_dir=str(tmp_path / "unet")))
    classifier = replace(CLASSIFIER_PRESETS["digits"], **shape, max_train_steps=2, checkpointing_steps=1)
    train(replace(classifier, checkpoints_total_limit=0, validation_images=4, output_dir=str(tmp_path / "classifier")))
    report = tmp_path / "report.md"
    report.write_text("<!-- classifier-quality:start -->\nold\n<!-- classifier-quality:end -->\n")
    options = classifier_quality.Options(
        run=tmp_path / "classifier",
        model=str(tmp_path / "unet"),
        dataset="digits",
        steps=(1, 2, 3),
        guidance_scales=(2.0,),
        num_samples=4,
        num_images=8,
        num_inference_steps=2,
        dtype="float32",
        update=report,
    )
    classifier_quality.main(options)
    rows = [line for line in report.read_text().splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[0] for row in rows] == ["| 1", "| 2"] and (tmp_path / "classifier_quality.png").exists()

    for change in ({"num_samples": 5}, {"seed": 1}, {"model": "other"}):  # their figures cannot stand beside these
        with pytest.raises(
            ValueError, match=f"`{next(iter(change))}` is .*Remove the file or choose another `output`"
        ):
            classifier_quality.main(replace(options, **change))
    classifier_quality.main(replace(options, guidance_scales=(2.0, 4.0), steps=(2,)))  # adds what is missing
    rows = [line for line in report.read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) == 1 and rows[0].startswith("| 2 |")


def test_memory_and_speed_of_a_training_step_are_ratios_to_float32(tmp_path):
    options = training_memory.Options(
        models=("adm/digits",), batch_size=2, steps=1, rounds=1, update=tmp_path / "RESULTS.md"
    )
    training_memory.main(options)
    rows = [line.split(" | ") for line in (tmp_path / "RESULTS.md").read_text().splitlines() if "adm/digits" in line]
    assert [row[1] for row in rows] == [variant.name for variant in training_memory.variants("cpu")]
    assert rows[0][3] == "1.00" and all(float(row[3]) > 0 for row in rows)


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


def test_screenshots_are_small_and_keep_their_colours_where_they_fit(tmp_path):
    path = tmp_path / "light.png"
    gradient = Image.fromarray(np.mgrid[0:256, 0:256].sum(0)[..., None].repeat(3, 2).astype(np.uint8))
    demo_screenshots.save_small(gradient, path)
    assert np.array_equal(Image.open(path), gradient) and path.stat().st_size <= demo_screenshots.MAX_BYTES

    generator = np.random.default_rng(0)
    demo_screenshots.save_small(Image.fromarray(generator.integers(0, 16, (500, 500, 3), np.uint8)), path)
    assert Image.open(path).mode == "P" and path.stat().st_size <= demo_screenshots.MAX_BYTES

    noise = Image.fromarray(generator.integers(0, 256, (900, 1440, 3), np.uint8))
    with pytest.raises(RuntimeError, match="light.png has [0-9]+ bytes with 256 colours; 300000 is the limit"):
        demo_screenshots.save_small(noise, path)
