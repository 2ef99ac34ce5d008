"""Model cards of training runs."""

import os
import re
import shlex
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard
from PIL import Image

from diffusers_ext.cards import training_command
from diffusers_ext.cli import _parse
from diffusers_ext.training.config import CLASSIFIER_PRESETS, UNET_PRESETS
from diffusers_ext.training.loop import train


TINY = {
    "block_out_channels": (8, 16),
    "attention_head_dim": 8,
    "train_batch_size": 4,
    "max_train_steps": 2,
    "validation_images": 4,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders of a UNet, and of a classifier that guides it."""
    folder = tmp_path_factory.mktemp("runs")
    unet = replace(UNET_PRESETS["digits"], **TINY, output_dir=str(folder / "unet"), validation_inference_steps=2)
    classifier = replace(CLASSIFIER_PRESETS["digits"], **TINY, output_dir=str(folder / "guided"), unet=unet.output_dir)
    train(unet)
    train(classifier)
    return folder


@pytest.mark.parametrize(
    "name, networks", [("unet", ["ADMUNet2DModel"]), ("guided", ["ADMClassifierModel", "ADMUNet2DModel"])]
)
def test_card_of_a_run_says_what_it_is_and_how_it_is_used(name, networks, runs, fresh_python):
    card = ModelCard.load(runs / name / "README.md")
    assert card.data.library_name == "diffusers" and card.data.tags == ["diffusers_ext", *networks]
    assert str(runs) not in card.content  # nothing about the machine
    assert "| optimizer steps | 2 |" in card.text and "diffusers-ext train" in card.text
    picture = re.search(r"!\[.*?\]\((samples/.*?)\)", card.text)[1]
    assert (runs / name / picture).is_file()
    snippet = re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1].replace("=50", "=2")
    fresh_python(snippet, runs / name)
    assert Image.open(runs / name / "sample.png").size == (8, 8)
    assert not [path for path in runs.rglob("*unfinished*")]


def test_card_of_a_guided_run_tells_the_accuracy_at_eight_noise_levels(runs):
    text = (runs / "guided" / "README.md").read_text()
    assert len(re.findall(r"^\| \d+-\d+ \|", text, re.MULTILINE)) == 8
    assert (runs / "guided" / "noise_levels.png").is_file()


@pytest.mark.parametrize(
    "config",
    [
        UNET_PRESETS["digits"],
        replace(UNET_PRESETS["film-mnist"], use_ema=False, ema_decay=(0.9, 0.99), resolutions=(24, 32), seed=3),
        replace(CLASSIFIER_PRESETS["mnist"], model_options=("dropout=0.1", 'pool="spatial"'), report_to="tensorboard"),
    ],
    ids=["preset", "unet", "classifier"],
)
def test_command_in_the_card_trains_with_the_same_options(config):
    words = shlex.split(training_command(config))
    assert words[0] == "diffusers-ext"
    assert _parse(words[1:]) == config


def test_paths_of_the_machine_stay_out_of_the_command():
    config = replace(CLASSIFIER_PRESETS["digits"], unet=os.path.abspath("runs/secret/digits-unet"))
    assert "--unet digits-unet" in training_command(config) and "secret" not in training_command(config)
