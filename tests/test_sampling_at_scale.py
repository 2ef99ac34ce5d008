"""Sample sets: the same images however many processes draw them, whenever they stop, and nothing overwritten."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BertConfig, BertModel, BertTokenizer

from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)

from diffusers_ext import ADMClassifierModel, ADMUNet2DModel, ComposableUNet2DModel
from diffusers_ext.evaluation.drawing import SCHEDULERS, drawing, open_pipeline, scheduler_class
from diffusers_ext.evaluation.samples import SampleFolder, read_samples
from diffusers_ext.evaluation.sampling import SampleConfig, sample
from diffusers_ext.pipelines import ClassConditionalPipeline, ClassifierGuidedPipeline


UNET = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}
ADM = {**UNET, "attention_resolutions": (4,)}
NAMES = {0: "circle", 1: "square", 2: "star"}
DRAW = """
import json, sys
from diffusers_ext.evaluation.sampling import SampleConfig, sample
if __name__ == "__main__":
    sample(SampleConfig(**json.loads(sys.argv[1])))
"""


def save(pipe, path: Path) -> str:
    torch.manual_seed(0)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            with torch.no_grad():
                for parameter in component.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
    pipe.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """Folder of a tiny pipeline of three classes."""
    options = {"in_channels": 1, "out_channels": 1, "num_class_embeds": 3, "null_class": True, **ADM}
    pipe = ClassConditionalPipeline(unet=ADMUNet2DModel(**options), scheduler=DDPMScheduler(), id2label=NAMES)
    return save(pipe, tmp_path_factory.mktemp("model") / "conditional")


@pytest.fixture
def config(model, tmp_path) -> SampleConfig:
    return SampleConfig(
        model, output=str(tmp_path / "samples"), num_samples=8, batch_size=3, num_inference_steps=2, device="cpu"
    )


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory) -> bytes:
    """`samples.npz` of one uninterrupted process."""
    output = str(tmp_path_factory.mktemp("once"))
    config = SampleConfig(model, output=output, num_samples=8, batch_size=3, num_inference_steps=2, device="cpu")
    return sample(config).read_bytes()


def command(config: SampleConfig, folder: Path, *launcher: str) -> tuple[list[str], dict[str, str]]:
    script = folder / "draw.py"
    script.write_text(DRAW)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    return [sys.executable, *launcher, str(script), json.dumps(asdict(config))], environment


def read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return dict(file)


def test_the_merged_file_is_what_the_evaluator_of_guided_diffusion_reads(config, model):
    path = sample(config)
    arrays = read(path)
    assert arrays["arr_0"].shape == (8, 8, 8, 3) and arrays["arr_0"].dtype == np.uint8
    assert arrays["arr_1"].dtype == np.int64 and arrays["arr_1"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    pipe = open_pipeline(config)
    generators = [torch.Generator().manual_seed(index) for index in (3, 4, 5)]
    drawn = pipe([0, 1, 2], num_inference_steps=2, generator=generators, output_type="np").images
    torch.testing.assert_close(arrays["arr_0"][3:6, ..., :1] / 255, drawn.astype(np.float64), rtol=0, atol=0.51 / 255)
    assert Image.open(path.parent / "samples.png").size == (24, 24)  # 3x3 images of 8 pixels, the last one black
    assert sorted(p.name for p in (path.parent / "shards").iterdir()) == [
        "000000-000002.npz",
        "000003-000005.npz",
        "000006-000007.npz",
    ]
    assert not list(path.parent.rglob("*.partial"))


@pytest.mark.parametrize("format", ["npz", "png"])
def test_joining_leaves_alone_what_another_machine_is_writing(format, config):
    path = sample(replace(config, format=format))
    folder = SampleFolder(path.parent, config.num_samples, config.batch_size)
    fresh, old, old_folder = (path.with_name(f"{path.name}.{name}.partial") for name in ("a", "b", "c"))
    fresh.touch()
    old.touch()
    old_folder.mkdir()
    for leftover in (old, old_folder):
        os.utime(leftover, (time.time() - 2 * 24 * 3600,) * 2)
    folder.merge(format)
    assert list(path.parent.glob("*.partial")) == [fresh]


def test_a_join_that_fails_leaves_nothing(config, monkeypatch):
    path = sample(config)
    folder = SampleFolder(path.parent, config.num_samples, config.batch_size)

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        folder.merge("npz")
    assert not list(path.parent.glob("*.partial")) and folder.is_merged("npz")


def test_pngs_hold_the_same_pixels(config, expected, tmp_path):
    folder = sample(replace(config, format="png"))
    assert len(list(folder.glob("*.png"))) == 8 and Image.open(folder / "000000.png").mode == "L"
    assert json.loads((folder.parent / "labels.json").read_text())["000005.png"] == 2
    (tmp_path / "once.npz").write_bytes(expected)
    one, other = read_samples(folder.parent), read_samples(tmp_path / "once.npz")
    assert one.images.shape == (8, 1, 8, 8)
    np.testing.assert_array_equal(one.images, other.images)
    np.testing.assert_array_equal(one.labels, other.labels)
    assert read_samples(folder, channels=3).images.shape == (8, 3, 8, 8)


def test_two_processes_draw_what_one_draws(config, expected, tmp_path):
    arguments, environment = command(
        config, tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"
    )
    environment.pop("OMP_NUM_THREADS", None)
    subprocess.run(arguments, env=environment, check=True, timeout=200, capture_output=True)
    assert (Path(config.output) / "samples.npz").read_bytes() == expected


def test_machines_without_a_process_group_share_a_folder(config, expected, capsys):
    first = sample(replace(config, num_shards=2, shard_index=0))
    assert not first.exists()
    assert "1 of 3 shards (000003-000005) are to come from other machines" in capsys.readouterr().out
    assert sample(replace(config, num_shards=2, shard_index=1)).read_bytes() == expected


def test_number_of_threads_of_the_caller_changes_nothing(config, expected):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert sample(config).read_bytes() == expected and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_a_killed_run_goes_on_where_it_was(config, tmp_path):
    config = replace(config, num_inference_steps=50)
    arguments, environment = command(config, tmp_path)
    folder = SampleFolder(Path(config.output), config.num_samples, config.batch_size)
    process = subprocess.Popen(arguments, env=environment, stderr=subprocess.DEVNULL)
    while not folder.file(0).exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    drawn = [shard for shard in range(folder.num_shards) if shard not in folder.missing()]
    assert drawn and not folder.is_merged("npz")
    written = {shard: folder.file(shard).stat().st_mtime_ns for shard in drawn}

    (folder.shards / "000003-000005.partial").write_bytes(b"half")
    resumed = sample(config).read_bytes()
    assert written == {shard: folder.file(shard).stat().st_mtime_ns for shard in drawn}  # not drawn again
    assert resumed == sample(replace(config, output=str(tmp_path / "once"))).read_bytes()


@pytest.mark.parametrize("damage", ["short", "changed", "empty"])
def test_damaged_shards_are_drawn_again(damage, config, expected):
    path = sample(config)
    shard = SampleFolder(path.parent, 8, 3).file(1)
    content = bytearray(shard.read_bytes())
    if damage == "short":
        content = content[:100]
    elif damage == "changed":
        content[300] ^= 255
    else:
        content = b""
    shard.write_bytes(content)
    path.write_bytes(path.read_bytes()[:1000])
    assert sample(config).read_bytes() == expected
    assert SampleFolder(path.parent, 8, 3).missing() == []


def test_a_finished_set_is_returned_without_its_shards(config):
    path = sample(config)
    for shard in (path.parent / "shards").iterdir():
        shard.unlink()
    before = path.stat().st_mtime_ns
    assert sample(config).stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "change, message",
    [
        ({"seed": 1}, "`seed` is 1, but .* holds samples drawn with 0"),
        ({"num_samples": 9}, "`num_samples` is 9, but"),
        ({"guidance_scale": 1.5}, "`guidance_scale` is 1.5, but .* drawn with None"),
        ({"scheduler": "ddim"}, "`scheduler.class` is 'DDIMScheduler', but .* drawn with 'DDPMScheduler'"),
        ({"scheduler_options": ("beta_end=0.1",)}, "`scheduler.beta_end` is 0.1, but"),
        ({"class_labels": ("1",)}, r"`class_labels` is \[1\], but .* \[0, 1, 2\]"),
        ({"call_options": ("height=8", "width=8")}, "`call_options.height` is 8, but .* None"),
        ({"dtype": "bfloat16"}, "`(model|dtype)` is"),
    ],
)
def test_other_options_do_not_mix_into_a_folder(change, message, config):
    sample(config)
    with pytest.raises(ValueError, match=message):
        sample(replace(config, **change))


def test_other_weights_do_not_mix_into_a_folder(config):
    sample(config)
    pipe = open_pipeline(config)
    next(pipe.unet.parameters()).data += 1e-3
    with pytest.raises(ValueError, match="`model` is 'ClassConditionalPipeline with weights"):
        sample(config, pipe)


def test_equal_options_in_other_words_go_on(config):
    path = sample(config)
    assert sample(replace(config, scheduler="ddpm", class_labels=("balanced",))) == path
    assert sample(replace(config, class_labels=("circle", "1", "star"))) == path


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_samples": 0}, "`num_samples` is 0; it must be at least 1"),
        ({"shard_index": 2, "num_shards": 2}, "`shard_index` is 2 and `num_shards` 2"),
        ({"scheduler": "dpm"}, r"`scheduler` \('dpm'\) must be one of ddpm, ddim"),
        ({"scheduler": "UNet2DModel"}, r"`scheduler` \('UNet2DModel'\) must be"),
        ({"scheduler_options": ("karras=true",)}, "`scheduler_options` holds 'karras', which DDPMScheduler"),
        ({"scheduler_options": ("karras",)}, "`scheduler_options` holds 'karras'; write name=value"),
        ({"guidance_mode": "mean"}, "`guidance_mode` is 'mean', but ClassConditionalPipeline does not have it"),
        ({"call_options": ("strength=1",)}, r"`strength` \(of `call_options`\) is 1, but"),
        ({"guidance_interval": (0.5, 0.2)}, r"`guidance_interval` is \(0.5, 0.2\)"),
        ({"class_labels": ("moon",)}, "`class_labels` holds 'moon', which is not a name of a class"),
        ({"class_labels": ("3",)}, r"`class_labels` holds \[3\]; the model knows 3 classes"),
        ({"prompts": "nowhere.txt"}, r"`prompts` \('nowhere.txt'\) must be a text file"),
        ({"model": "/nowhere"}, r"`model` \('/nowhere'\) looks like a local folder, but there is none"),
        ({"eta": 0.5}, "`eta` is 0.5, which `scheduler` DDPMScheduler does not have"),
        (
            {"scheduler": "flow-euler"},
            r"`scheduler` \('flow-euler'\) follows a flow, but the model was trained on",
        ),
        ({"device": "xpu:7"}, "`device` is 'xpu:7', which this machine does not have"),
    ],
)
def test_wrong_options_are_named(change, message, config):
    with pytest.raises(ValueError, match=message):
        sample(replace(config, **change))


def test_samples_without_labels(config):
    assert "arr_1" not in read(sample(replace(config, class_labels=None)))


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim", "dpmsolver++", "euler-ancestral", "heun", "unipc", "pndm"])
def test_schedulers_by_name_draw_alike_in_batches_of_any_owner(scheduler, config, tmp_path):
    config = replace(config, scheduler=scheduler, num_samples=5, num_inference_steps=4)
    whole = sample(config)
    for index in (1, 0):
        parts = sample(replace(config, output=str(tmp_path / "parts"), num_shards=2, shard_index=index))
    assert whole.read_bytes() == parts.read_bytes()


def test_a_flow_is_followed_by_schedulers_that_can(tmp_path):
    options = {"in_channels": 1, "out_channels": 1, "num_class_embeds": 3, **ADM}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    pipe = ClassConditionalPipeline(unet=ADMUNet2DModel(**options), scheduler=scheduler)
    own = SampleConfig("", output="", scheduler="flow-euler")
    with drawing(pipe, own):
        assert pipe.scheduler.config.shift == 2.0
    for name in ("dpmsolver++", "unipc", "deis", "sa-solver"):
        with drawing(pipe, replace(own, scheduler=name)):
            followed = pipe.scheduler.config
            assert followed.use_flow_sigmas and followed.prediction_type == "flow_prediction"
            assert followed.flow_shift == 2.0
    with pytest.raises(ValueError, match=r"`scheduler` \('ddim'\) follows a diffusion process, but the model"):
        with drawing(pipe, replace(own, scheduler="ddim")):
            pass
    path = save(pipe, tmp_path / "flow")
    draw = {"num_samples": 2, "num_inference_steps": 4, "scheduler": "dpmsolver++", "device": "cpu"}
    assert sample(SampleConfig(path, output=str(tmp_path / "out"), **draw)).exists()


def test_every_short_name_is_a_scheduler():
    for name in SCHEDULERS:
        try:
            assert scheduler_class(name).__name__ == SCHEDULERS[name]
        except ImportError as error:
            assert name == "dpmsolver-sde" and "pip install torchsde" in str(error)


def guided(path):
    unet = ADMUNet2DModel(in_channels=3, out_channels=3, **ADM)
    pipe = ClassifierGuidedPipeline(unet, DDIMScheduler(), ADMClassifierModel(in_channels=3, num_classes=4, **ADM))
    return save(pipe, path)


def unconditional(path, pipeline, scheduler):
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return save(pipeline(UNet2DModel(in_channels=3, out_channels=3, **UNET, **blocks), scheduler), path)


@pytest.mark.parametrize(
    "build, options, labels",
    [
        (guided, {"guidance_scale": 2.0, "guidance_mode": "score", "eta": 0.5}, [0, 1, 2, 3]),
        (lambda path: unconditional(path, DDPMPipeline, DDPMScheduler()), {}, None),
        (lambda path: unconditional(path, DDIMPipeline, DDIMScheduler()), {"eta": 1.0}, None),
    ],
    ids=["ClassifierGuidedPipeline", "DDPMPipeline", "DDIMPipeline"],
)
def test_colour_pipelines_of_ours_and_of_diffusers(build, options, labels, tmp_path):
    model = build(tmp_path / "model")
    config = SampleConfig(
        model,
        output=str(tmp_path / "out"),
        num_samples=4,
        batch_size=2,
        num_inference_steps=2,
        device="cpu",
        **options,
    )
    arrays = read(sample(config))
    assert arrays["arr_0"].shape == (4, 8, 8, 3) and len(np.unique(arrays["arr_0"])) > 2
    assert (arrays["arr_1"].tolist() if labels else arrays.get("arr_1")) == labels


def test_latent_transformer_of_diffusers(tmp_path):
    from diffusers import AutoencoderKL, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        sample_size=4, in_channels=4, out_channels=8, num_embeds_ada_norm=1000, num_layers=1, num_attention_heads=2,
        attention_head_dim=4, patch_size=2,
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, down_block_types=(
        "DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip
    model = save(DiTPipeline(transformer, vae, DDIMScheduler()), tmp_path / "model")
    config = SampleConfig(
        model, output=str(tmp_path / "out"), num_samples=3, batch_size=2, num_inference_steps=2, device="cpu"
    )
    arrays = read(sample(replace(config, guidance_scale=2.0, class_labels=("7", "8"))))
    assert arrays["arr_0"].shape == (3, 8, 8, 3) and arrays["arr_1"].tolist() == [7, 8, 7]


def test_prompts_are_drawn_in_turn(tmp_path):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "square", "star"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    width = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    unet = ComposableUNet2DModel(in_channels=1, out_channels=1, cross_attention_dim=16, **ADM)
    encoder = BertModel(BertConfig(vocab_size=len(words), **width))
    text = {"text_encoder": encoder, "tokenizer": BertTokenizer(str(tmp_path / "vocab.txt"))}
    model = save(ClassConditionalPipeline(unet=unet, scheduler=DDIMScheduler(), **text), tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a red square\n\na star\n")
    options = {"output": str(tmp_path / "out"), "num_samples": 3, "num_inference_steps": 2, "device": "cpu"}
    config = SampleConfig(model, prompts=str(tmp_path / "prompts.txt"), batch_size=2, guidance_scale=3.0, **options)
    arrays = read(sample(config))
    assert arrays["arr_0"].shape == (3, 8, 8, 3) and "arr_1" not in arrays
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["options"]["prompts"] == ["a red square", "a star"]
    with pytest.raises(ValueError, match="ClassConditionalPipeline draws from text: give `prompts`"):
        sample(replace(config, prompts=None))


def test_images_in_a_folder_are_read(tmp_path):
    with pytest.raises(ValueError, match="holds neither samples.npz nor images"):
        read_samples(tmp_path)
    Image.new("RGB", (4, 4), (0, 0, 9)).save(tmp_path / "b.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    assert read_samples(tmp_path).images[:, 2].max(axis=(1, 2)).tolist() == [0, 9]
    (tmp_path / "labels.json").write_text('{"a.png": 1}')
    with pytest.raises(ValueError, match="has no label of b.png"):
        read_samples(tmp_path)
    Image.new("RGB", (5, 4)).save(tmp_path / "c.png")
    with pytest.raises(ValueError, match="c.png has"):
        read_samples(tmp_path)
