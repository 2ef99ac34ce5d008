"""The `diffusers-ext` command: options of a training."""

import pytest

from diffusers_ext.cli import main
from diffusers_ext.training.config import CLASSIFIER_PRESETS, UNET_PRESETS


@pytest.fixture
def options(capsys):
    """What `--dry_run` prints for a command line: `options("train unet --seed 1")`."""

    def read(line: str) -> dict[str, str]:
        main([*line.split(), "--dry_run"])
        return dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())

    return read


@pytest.mark.parametrize("task, presets", [("unet", UNET_PRESETS), ("classifier", CLASSIFIER_PRESETS)])
@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_preset_fills_what_is_not_given(task, presets, name, options):
    read = options(f"train {task} --preset {name} --seed 7")
    assert presets[name].preset == name
    assert read["seed"] == "7" and presets[name].seed == 0
    assert read["block_out_channels"] == str(presets[name].block_out_channels)
    assert read["output_dir"] == presets[name].output_dir


def test_options_are_those_that_diffusers_users_know(options):
    line = (
        "--mixed_precision fp16 --gradient_accumulation_steps 2 --checkpointing_steps 5 --checkpoints_total_limit 3 "
        "--resume_from_checkpoint latest --use_ema --seed 1 --lr_scheduler linear --lr_warmup_steps 4 "
        "--learning_rate 0.5 --train_batch_size 8 --max_train_steps 9 --output_dir out --report_to wandb "
        "--validation_steps 6"
    )
    read = options(f"train unet {line} --block_out_channels 8 16 --attention_resolutions 4")
    words = line.replace("--use_ema ", "").split()
    assert {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2])}.items() <= read.items()
    assert read["use_ema"] == "True" and read["block_out_channels"] == "(8, 16)"
    assert options("train unet --no_use_ema --learned-variance")["use_ema"] == "False"


@pytest.mark.parametrize(
    "line, message",
    [
        ("train unet --preset cifar", "digits"),
        ("train", "unet"),
        ("train unet --lr_scheduler step", "cosine"),
        ("draw", "convert"),
    ],
)
def test_wrong_command_says_what_is_possible(line, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(line.split())
    assert stopped.value.code == 2
    output = capsys.readouterr()
    assert message in output.out + output.err


def test_training_runs_from_the_command_line(tmp_path, capsys):
    size = "--block_out_channels 8 16 --attention_head_dim 8 --max_train_steps 2 --train_batch_size 4"
    main(f"train classifier {size} --output_dir {tmp_path} --validation_images 4".split())
    assert f"Saved {tmp_path / 'classifier'}" in capsys.readouterr().out
    assert (tmp_path / "config.json").exists()
