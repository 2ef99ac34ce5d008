"""Two processes, on a CPU by torchrun: they train as one does, and stop, skip and resume together."""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin
from test_training import TINY_UNET, lines, untimed, weights_of

from diffusers_ext.training.checkpoints import checkpoints
from diffusers_ext.training.loop import train
from diffusers_ext.training.preparation import adapt_deepspeed
from diffusers_ext.training.tasks import UNetTask


TINY = replace(TINY_UNET, max_train_steps=4, checkpointing_steps=2, dropout=0.1, lr_scheduler="constant")


def scenarios(folder: Path) -> None:
    """What each of the two processes does, one training after the other."""
    rank = int(os.environ["RANK"])
    original, validate = UNetTask.losses, UNetTask.validate
    calls = 0

    def losses(self, model, batch):
        """Trouble in the second process, in its second step."""
        nonlocal calls
        calls += 1
        found = original(self, model, batch)
        if (rank, calls) == (1, 2):
            if trouble == "signal":
                signal.raise_signal(signal.SIGTERM)
            elif trouble == "nan":
                return found | {"loss": found["loss"] * float("nan")}
        return found

    def validate_in_trouble(self, *args):
        """Only the first process validates."""
        if trouble == "signal in a validation":
            signal.raise_signal(signal.SIGTERM)
        elif trouble == "error in a validation":
            raise RuntimeError("out of memory")
        return validate(self, *args)

    UNetTask.losses, UNetTask.validate = losses, validate_in_trouble
    Accelerator.end_training = lambda self: None  # the processes stay connected for the next training
    for name, trouble, options in (
        ("two", None, {}),
        ("stopped", "signal", {}),
        ("stopped", None, {"resume_from_checkpoint": "latest"}),
        ("skipped", "nan", {"on_nonfinite": "skip"}),
        ("failed", "nan", {}),
        ("validated", "signal in a validation", {"validation_steps": 1}),
        ("validated", "signal in a validation", {"validation_steps": 1, "resume_from_checkpoint": "latest"}),
        ("validated", "error in a validation", {"validation_steps": 3, "resume_from_checkpoint": "latest"}),
        ("validated", None, {"resume_from_checkpoint": "latest"}),
        ("unreadable", None, {"resume_from_checkpoint": "checkpoint-" + "1" * 300}),  # too long for a file's name
    ):
        calls, outcome = 0, "finished"
        try:
            train(replace(TINY, output_dir=str(folder / name), **options))
        except SystemExit as stopped:
            outcome = f"exit {stopped.code}"
        except (FloatingPointError, RuntimeError, OSError, ValueError) as error:
            outcome = str(error)
        with (folder / f"outcomes-{rank}.jsonl").open("a") as file:
            file.write(json.dumps(outcome) + "\n")
        AcceleratorState._reset_state(reset_partial_state=False)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory, root) -> Path:
    """The folder with what the two processes left."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port", str(port)]
    environment = {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{root}{os.pathsep}{root}/tests",
    }
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *arguments, __file__, str(folder)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    if done.returncode:
        pytest.fail(f"the processes failed:\n{done.stdout}{done.stderr}", pytrace=False)
    return folder


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Path:
    """The run folder of one process that makes as many forward passes per step."""
    folder = tmp_path_factory.mktemp("one") / "one"
    train(replace(TINY, output_dir=str(folder), gradient_accumulation_steps=2))
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


def assert_nearly_the_same(actual: Path, expected: Path) -> None:
    torch.testing.assert_close(weights_of(actual / "unet"), weights_of(expected / "unet"), rtol=1e-4, atol=1e-4)
    moments = [torch.load(run / "checkpoint-4" / "optimizer.bin")["state"] for run in (actual, expected)]
    torch.testing.assert_close(*moments, rtol=1e-3, atol=1e-6)  # averages of the gradients and of their squares


def test_two_processes_have_the_gradients_of_one(two_processes, one_process):
    assert_nearly_the_same(two_processes / "two", one_process)
    for one, two in zip(lines(one_process), lines(two_processes / "two"), strict=True):
        assert one.keys() == two.keys()
        assert two.get("loss", 0) == pytest.approx(one.get("loss", 0), rel=1e-4)


def test_one_process_goes_on_from_the_checkpoint_of_two(two_processes, one_process, tmp_path):
    checkpoint = str(two_processes / "two" / "checkpoint-2")
    (tmp_path / "resumed").mkdir()
    (tmp_path / "resumed" / "checkpoint-2").symlink_to(checkpoint)
    config = replace(TINY, output_dir=str(tmp_path / "resumed"), gradient_accumulation_steps=2)
    train(replace(config, resume_from_checkpoint="latest"))
    AcceleratorState._reset_state(reset_partial_state=True)
    assert_nearly_the_same(tmp_path / "resumed", one_process)


def test_a_signal_to_one_process_stops_both_after_the_same_step(two_processes):
    outcomes = [(two_processes / f"outcomes-{rank}.jsonl").read_text().splitlines() for rank in (0, 1)]
    assert outcomes[0][:4] == outcomes[1][:4] == ['"finished"', '"exit 143"', '"finished"', '"finished"']
    torch.testing.assert_close(
        weights_of(two_processes / "stopped" / "unet"), weights_of(two_processes / "two" / "unet")
    )
    assert [line["step"] for line in untimed(two_processes / "stopped")] == [
        line["step"] for line in untimed(two_processes / "two")
    ]


def test_a_loss_that_is_not_finite_in_one_process_concerns_both(two_processes):
    assert lines(two_processes / "skipped")[0]["nonfinite_steps"] == 1
    assert [path.name for path in checkpoints(two_processes / "skipped")] == ["checkpoint-2", "checkpoint-4"]
    batches = iter(UNetTask(TINY).data.batches(8, TINY.seed, first=1, stride=2))
    rows = [next(batches).rows for _ in range(2)][1]
    for rank in (0, 1):
        told = json.loads((two_processes / f"outcomes-{rank}.jsonl").read_text().splitlines()[4])
        assert told.startswith(f"The loss is nan at step 2, in the batch of rows {', '.join(map(str, rows))}.")


def test_processes_stop_and_fail_together_in_a_validation(two_processes):
    outcomes = [(two_processes / f"outcomes-{rank}.jsonl").read_text().splitlines()[5:9] for rank in (0, 1)]
    assert outcomes[0] == ['"exit 143"', '"exit 143"', '"out of memory"', '"finished"']
    assert outcomes[1] == [
        *outcomes[0][:2],
        '"The validation failed in the main process, see its error."',
        '"finished"',
    ]
    torch.testing.assert_close(
        weights_of(two_processes / "validated" / "unet"), weights_of(two_processes / "two" / "unet")
    )


def test_an_error_about_a_checkpoint_concerns_both(two_processes):
    outcomes = [(two_processes / f"outcomes-{rank}.jsonl").read_text().splitlines()[9] for rank in (0, 1)]
    assert outcomes[0] == outcomes[1] and "checkpoint-1111" in outcomes[0]


def test_deepspeed_clips_as_asked_and_shards_no_weights():
    config = replace(TINY, max_grad_norm=0.3)
    plugin = DeepSpeedPlugin(zero_stage=2)
    adapt_deepspeed(plugin, config)
    assert plugin.deepspeed_config["gradient_clipping"] == 0.3
    with pytest.raises(ValueError, match="`zero_stage` is 3 .*use FSDP2 .*or ZeRO-2"):
        adapt_deepspeed(DeepSpeedPlugin(zero_stage=3), config)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "deepspeed_zero2"])
def test_configurations_of_accelerate_are_read_by_it(name, root):
    config = load_config_from_file(str(root / "diffusers_ext" / "training" / "accelerate" / f"{name}.yaml"))
    assert config.distributed_type.value == {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED"}[name]
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2


if __name__ == "__main__":
    scenarios(Path(sys.argv[1]))
