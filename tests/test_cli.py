"""The `diffusers-ext` command: options of a training, from presets, files and the command line."""

import pytest
import yaml

from diffusers_ext.cli import main
from diffusers_ext.training.config import CLASSIFIER_PRESETS, UNET_PRESETS


@pytest.fixture
def options(capsys):
    """What `--dry_run` prints for a command line, read as YAML: `options("train unet --seed 1")`."""

    def read(line: str) -> dict:
        main([*line.split(), "--dry_run"])
        return yaml.safe_load(capsys.readouterr().out)

    return read


@pytest.mark.parametrize("task, presets", [("unet", UNET_PRESETS), ("classifier", CLASSIFIER_PRESETS)])
@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_preset_fills_what_is_not_given(task, presets, name, options):
    read = options(f"train {task} --preset {name} --seed 7 --dataset digits")
    assert presets[name].preset == name
    assert read["seed"] == 7 and presets[name].seed == 0
    assert read["model"] == presets[name].model
    assert read["output_dir"] == presets[name].output_dir


def test_options_are_those_that_diffusers_users_know(options):
    line = (
        "--mixed_precision bf16 --gradient_accumulation_steps 2 --checkpointing_steps 5 --checkpoints_total_limit 3 "
        "--resume_from_checkpoint latest --seed 1 --lr_scheduler linear --lr_warmup_steps 4 --learning_rate 0.5 "
        "--train_batch_size 8 --max_train_steps 9 --output_dir out --report_to wandb --validation_steps 6 "
        "--hub_model_id me/digits"
    )
    flags = "--gradient_checkpointing --use_ema --push_to_hub --hub_private_repo"
    read = options(f"train unet {line} {flags} --block_out_channels 8 16 --attention_head_dim 8")
    words = line.split()
    typed = {name.removeprefix("--"): yaml.safe_load(value) for name, value in zip(words[::2], words[1::2])}
    assert typed.items() <= read.items()
    assert all(read[flag.removeprefix("--")] is True for flag in flags.split())
    assert read["block_out_channels"] == [8, 16]
    assert options("train unet --no_use_ema --learned-variance --validation_epochs 2")["use_ema"] is False


def test_a_file_changes_the_preset_and_is_changed_by_what_is_typed(tmp_path, options):
    path = tmp_path / "options.yaml"
    path.write_text(
        "preset: mnist\ndataset: digits\nlearning_rate: 1e-4\nuse_ema: false\nema_decay: [0.9, 0.99]\n"
        "block_out_channels: [16, 32]\nvalidation_epochs: null\nseed: 3\n"
    )
    read = options(f"train unet --config {path} --seed 4")
    assert read["preset"] == "mnist" and read["model"] == UNET_PRESETS["mnist"].model
    assert read["learning_rate"] == 1e-4 and read["use_ema"] is False and read["ema_decay"] == [0.9, 0.99]
    assert read["block_out_channels"] == [16, 32] and read["validation_epochs"] is None
    assert read["seed"] == 4


def test_what_a_dry_run_prints_is_such_a_file(tmp_path, capsys, options):
    main(
        ["train", "unet", "--class_conditional", "--class_dropout_prob", "0.2", "--max_train_steps", "30", "--dry_run"]
    )
    printed = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(printed)
    assert options(f"train unet --config {tmp_path / 'again.yaml'}") == yaml.safe_load(printed)
    told = [line for line in printed.splitlines() if line.startswith("#")]
    assert "ADMUNet2DModel" in told[0] and "MB per process" in told[1]
    assert "30 of 64 images on 1 process: 1,920 images, 1.3 times the 1,500 of the data" in told[2]


def test_memory_of_a_dry_run_follows_the_options(capsys):
    def told(line: str) -> float:
        main(f"train unet --train_batch_size 256 {line} --dry_run".split())
        memory = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("# memory"))
        return float(memory.split("activations ")[1].split(")")[0].replace(",", ""))

    plain = told("")
    assert told("--gradient_checkpointing") < plain
    assert told("--mixed_precision bf16") == pytest.approx(plain / 2, abs=1)


@pytest.mark.parametrize(
    "text, message",
    [
        ("learning_rat: 1", "'learning_rat', which is no option of this training. Did you mean 'learning_rate'"),
        ("- 1\n- 2", "holds a list; it must hold `option: value` lines"),
        ("seed: [", "cannot be read as YAML: .* in line 1"),
        ("preset: cifar", "`preset` in .* is 'cifar'; it must be one of digits"),
    ],
)
def test_a_wrong_file_is_named(text, message, tmp_path):
    (tmp_path / "options.yaml").write_text(text)
    with pytest.raises(SystemExit, match=message):
        main(["train", "unet", "--config", str(tmp_path / "options.yaml"), "--dry_run"])
    with pytest.raises(SystemExit, match="`config` .*missing.yaml.* cannot be read"):
        main(["train", "unet", "--config", str(tmp_path / "missing.yaml"), "--dry_run"])


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


def test_wrong_options_end_with_one_line():
    with pytest.raises(SystemExit, match=r"^diffusers-ext train unet: `model` \('adm/film'\) is unknown"):
        main("train unet --model adm/film".split())


def test_an_interrupted_command_ends_with_one_line(monkeypatch, capsys):
    def interrupt(config):
        raise KeyboardInterrupt

    monkeypatch.setattr("diffusers_ext.evaluation.sampling.sample", interrupt)
    with pytest.raises(SystemExit) as stopped:
        main("sample somewhere --output there".split())
    assert stopped.value.code == 130
    assert capsys.readouterr().err.startswith("diffusers-ext sample: interrupted.")


def test_options_of_a_file_are_told_when_one_of_them_is_wrong(tmp_path, capsys):
    (tmp_path / "options.yaml").write_text("max_train_steps: many\n")
    with pytest.raises(SystemExit):
        main(["train", "unet", "--config", str(tmp_path / "options.yaml")])
    assert "options.yaml, as typed: --max_train_steps many" in capsys.readouterr().err


def test_training_runs_from_the_command_line(tmp_path, capsys):
    size = "--block_out_channels 8 16 --attention_head_dim 8 --max_train_steps 2 --train_batch_size 4"
    main(f"train classifier {size} --output_dir {tmp_path} --validation_images 4".split())
    assert f"Saved {tmp_path / 'classifier'}" in capsys.readouterr().out
    assert (tmp_path / "config.json").exists()
