"""Model cards: of runs and of every kind of folder, what of them stays, what is made anew, and when they are stale."""

import json
import os
import re
import shlex
import shutil
from dataclasses import replace

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig
from PIL import Image
from test_captions import tiny_pipe

import diffusers
from diffusers import (
    AutoencoderKL,
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    FlowMatchEulerDiscreteScheduler,
    RePaintPipeline,
    RePaintScheduler,
    UNet2DModel,
)
from diffusers.guiders import ClassifierFreeGuidance as CFG
from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card

import diffusers_ext
from diffusers_ext import (
    ADMClassifierModel,
    ADMUNet2DModel,
    ClassConditionalPipeline,
    ClassifierGuidedPipeline,
    ComposableUNet2DModel,
    DilatedConvDenoiserModel,
    GQADiTTransformer2DModel,
)
from diffusers_ext.cards import blocks, is_stale, merge_cards, training_command, write_card
from diffusers_ext.cards.document import EARLIER
from diffusers_ext.cards.folder import read_folder
from diffusers_ext.cli import _parse, main
from diffusers_ext.conversion import presets, save_original
from diffusers_ext.conversion.convert import convert_checkpoint
from diffusers_ext.evaluation.report import write_results_to_card
from diffusers_ext.hub import export, push
from diffusers_ext.training.config import CLASSIFIER_PRESETS, UNET_PRESETS
from diffusers_ext.training.loop import train


TINY = {
    "block_out_channels": (8, 16),
    "attention_head_dim": 8,
    "train_batch_size": 4,
    "max_train_steps": 2,
    "validation_images": 4,
}
ADM = {"sample_size": 8, "in_channels": 1, "block_out_channels": (8, 16), "layers_per_block": 1}
ADM |= {"attention_resolutions": (4,), "attention_head_dim": 8, "norm_num_groups": 4}
CLASSES = {"num_class_embeds": 3, "null_class": True}
DIT = {"sample_size": 8, "in_channels": 1, "patch_size": 2, "num_layers": 1, "num_attention_heads": 2}
DIT |= {"num_key_value_heads": 1, "attention_head_dim": 8, **CLASSES}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders of a UNet, and of a classifier that guides it."""
    folder = tmp_path_factory.mktemp("runs")
    unet = replace(UNET_PRESETS["digits"], **TINY, output_dir=str(folder / "unet"), validation_inference_steps=2)
    classifier = replace(CLASSIFIER_PRESETS["digits"], **TINY, output_dir=str(folder / "guided"), unet=unet.output_dir)
    train(replace(unet, license="CC-BY-4.0"))
    train(classifier)
    return folder


def snippets(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def block(card: str, name: str) -> str:
    return re.search(rf"<!-- {name}:start -->\n(.*?)\n<!-- {name}:end -->", card, re.DOTALL)[1]


def check_runs(folder, monkeypatch, **replaced: str) -> dict:
    """Run the first snippet of a folder's card in it; returns the names that it leaves."""
    (code, *_) = snippets((folder / "README.md").read_text())
    assert code.startswith("import diffusers_ext\n")
    code = re.sub(r"num_inference_steps=\d+", "num_inference_steps=2", code)
    for old, new in replaced.items():
        code = code.replace(old, new)
    monkeypatch.chdir(folder)
    names = {}
    exec(code, names)
    return names


# Training runs


def test_cards_of_runs_say_what_they_are_and_how_they_are_used(runs, fresh_python):
    code = []
    for name, networks in (("unet", ["ADMUNet2DModel"]), ("guided", ["ADMClassifierModel", "ADMUNet2DModel"])):
        card = ModelCard.load(runs / name / "README.md")
        assert card.data.library_name == "diffusers" and card.data.tags == ["diffusers_ext", *networks]
        assert str(runs) not in card.content  # nothing about the machine
        assert "| optimizer steps | 2 |" in card.text and "diffusers-ext train" in card.text
        picture = re.search(r"!\[.*?\]\((samples/.*?)\)", card.text)[1]
        assert (runs / name / picture).is_file()
        code += [f"import os; os.chdir({str(runs / name)!r})", snippets(card.text)[0].replace("=50", "=2")]
    fresh_python("\n".join(code), runs)
    assert Image.open(runs / "unet" / "sample.png").size == Image.open(runs / "guided" / "sample.png").size == (8, 8)
    assert not [path for path in runs.rglob("*unfinished*")]


def test_licence_of_a_run_is_that_of_its_options(runs):
    assert ModelCard.load(runs / "unet" / "README.md").data.license == "cc-by-4.0"
    card = ModelCard.load(runs / "guided" / "README.md")
    assert card.data.license is None and "No licence of the weights is stated" in card.text
    with pytest.raises(ValueError, match=r"`license` \(no licence at all\) must be an identifier"):
        replace(UNET_PRESETS["digits"], license="no licence at all")


def test_card_of_a_classifier_alone(tmp_path, monkeypatch):
    ADMClassifierModel(**ADM, num_classes=3).save_pretrained(tmp_path / "classifier")
    DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    write_card(tmp_path)
    assert check_runs(tmp_path, monkeypatch)["logits"].shape == (1, 3)
    assert ModelCard.load(tmp_path / "README.md").data.pipeline_tag == "image-classification"


def test_card_of_a_guided_run_tells_the_accuracy_at_eight_noise_levels(runs):
    text = (runs / "guided" / "README.md").read_text()
    assert len(re.findall(r"^\| \d+-\d+ \|", text, re.MULTILINE)) == 8
    assert (runs / "guided" / "noise_levels.png").is_file()


def test_what_the_training_told_stays_in_a_new_card(runs, tmp_path):
    shutil.copytree(runs / "guided", tmp_path / "run")
    told = block((tmp_path / "run" / "README.md").read_text(), "training")
    (tmp_path / "run" / "config.json").unlink()  # as in a published run
    write_card(tmp_path / "run", repo_id="me/guided", license="mit")
    card = (tmp_path / "run" / "README.md").read_text()
    assert block(card, "training") == told and 'from_pretrained("me/guided")' in card


@pytest.mark.parametrize(
    "config",
    [
        UNET_PRESETS["digits"],
        replace(UNET_PRESETS["film-mnist"], use_ema=False, ema_decay=(0.9, 0.99), resolutions=(24, 32), seed=3),
        replace(CLASSIFIER_PRESETS["mnist"], model_options=("dropout=0.1", 'pool="spatial"'), license="mit"),
    ],
    ids=["preset", "unet", "classifier"],
)
def test_command_in_the_card_trains_with_the_same_options(config):
    words = shlex.split(training_command(config))
    assert words[0] == "diffusers-ext"
    assert _parse(words[1:]) == config


@pytest.mark.parametrize(
    "path", ["../../home/bob/data", "file:///home/bob/data", "C:\\\\Users\\\\bob\\\\data", "./bob/data"]
)
def test_paths_of_data_stay_out_of_the_command(path):
    command = training_command(replace(UNET_PRESETS["digits"], dataset=path))
    assert shlex.split(command)[-2:] == ["--dataset", "data"]


def test_paths_of_the_machine_stay_out_of_the_command():
    config = replace(CLASSIFIER_PRESETS["digits"], unet=os.path.abspath("runs/secret/digits-unet"))
    assert "--unet digits-unet" in training_command(config) and "secret" not in training_command(config)


# Every kind of folder


def class_conditional(**parts) -> ClassConditionalPipeline:
    torch.manual_seed(0)
    parts = {"scheduler": DDPMScheduler()} | parts
    return ClassConditionalPipeline(**parts)


def tiny_vae() -> AutoencoderKL:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(**blocks, block_out_channels=(4, 8), norm_num_groups=2, latent_channels=4, sample_size=16)


UNET_2D = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (4, 8), "norm_num_groups": 2}
UNET_2D |= {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "attention_head_dim": 2}
PIPELINES = {
    "classifier guidance": lambda: ClassifierGuidedPipeline(
        unet=ADMUNet2DModel(**ADM, out_channels=2),
        classifier=ADMClassifierModel(**ADM, num_classes=3),
        scheduler=DDPMScheduler(variance_type="learned_range"),
        id2label={0: "cat", 1: "dog", 2: "newt"},
    ),
    "super-resolution": lambda: ClassifierGuidedPipeline(
        unet=ADMUNet2DModel(**ADM | {"in_channels": 2, "low_res_channels": 1, "out_channels": 1}),
        scheduler=DDPMScheduler(num_train_timesteps=40),
    ),
    "classes": lambda: class_conditional(
        unet=ComposableUNet2DModel(
            **ADM | CLASSES | {"out_channels": 1, "time_conditioning": "film", "class_conditioning": "film"}
        )
    ),
    "classes without a null class": lambda: class_conditional(
        transformer=GQADiTTransformer2DModel(**DIT | {"null_class": False, "out_channels": 1}),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    ),
    "unconditional": lambda: class_conditional(
        unet=DilatedConvDenoiserModel(sample_size=8, in_channels=1, hidden_channels=(8, 8), norm_num_groups=4)
    ),
    "latents": lambda: class_conditional(
        transformer=GQADiTTransformer2DModel(**DIT | {"in_channels": 4, "out_channels": 4})
    ),
    "autoencoder": lambda: class_conditional(
        transformer=GQADiTTransformer2DModel(**DIT | {"in_channels": 4, "out_channels": 4}), vae=tiny_vae()
    ),
    "pipeline of diffusers": lambda: DDPMPipeline(ADMUNet2DModel(**ADM, out_channels=1), DDPMScheduler()),
    "network of diffusers": lambda: class_conditional(unet=UNet2DModel(**UNET_2D)),
}
CITED = {
    "classifier guidance": ("dhariwal2021diffusion", "nichol2021improved"),
    "classes": ("ho2020denoising", "perez2018film", "ho2022classifier"),
    "classes without a null class": ("peebles2023scalable", "ainslie2023gqa", "liu2023flow"),
    "unconditional": ("ho2020denoising", "yu2016multi"),
    "autoencoder": ("peebles2023scalable", "ainslie2023gqa", "rombach2022high", "ho2022classifier"),
}


@pytest.mark.parametrize("kind", PIPELINES)
def test_snippet_of_every_kind_of_pipeline_runs(kind, tmp_path, monkeypatch):
    pipe = PIPELINES[kind]()
    pipe.save_pretrained(tmp_path)
    write_card(tmp_path, samples=False)
    first = (tmp_path / "README.md").read_bytes()
    assert is_stale(tmp_path) is None
    write_card(tmp_path)
    assert kind in ("super-resolution", "latents") or (tmp_path / "samples.png").is_file()
    Image.new("L", (4, 4)).save(tmp_path / "small.png")
    names = check_runs(tmp_path, monkeypatch)
    assert type(names["pipe"]) is type(pipe)
    if kind == "latents":
        assert names["latents"].shape == (1, 4, 8, 8)
    else:
        assert names["images"][0].size == ((16, 16) if kind == "autoencoder" else (8, 8))
        assert (tmp_path / "sample.png").is_file()

    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == "unconditional-image-generation" and "license" not in card.data.to_dict()
    for part in read_folder(tmp_path).networks.values():
        network = getattr(pipe, part.name)
        assert f"{network.num_parameters():,}" in block(card.text, "architecture")
        assert type(network).__name__ in block(card.text, "architecture")
    cited = re.findall(r"@\w+\{(\w+),", card.text)
    assert cited == list(CITED.get(kind, cited)) and len(cited) == len(set(cited)) > 0
    second = (tmp_path / "README.md").read_bytes()
    write_card(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == second and is_stale(tmp_path) is None
    shown = b"<!-- samples:start -->" in second
    assert (first == second) is not shown  # nothing but the picture


NARROW = {**ADM, "out_channels": 1}
SNIPPETS = {
    "guider": (lambda: class_conditional(unet=ComposableUNet2DModel(**NARROW | CLASSES), guider=CFG()), "[0], num"),
    "null label of the pipeline": (
        lambda: class_conditional(unet=ComposableUNet2DModel(**NARROW, num_class_embeds=3), null_class_label=2),
        "[0], guidance_scale=2.0, num",
    ),
    "worse model": (
        lambda: class_conditional(
            unet=ComposableUNet2DModel(**NARROW, num_class_embeds=3),
            guide_model=ComposableUNet2DModel(**NARROW, num_class_embeds=3),
        ),
        "[0], guidance_scale=2.0, num",
    ),
    "no classifier": (
        lambda: ClassifierGuidedPipeline(unet=ADMUNet2DModel(**NARROW | CLASSES), scheduler=DDPMScheduler()),
        "pipe(class_labels=[0], num",
    ),
    "DiT of 3 classes": (
        lambda: DiTPipeline(
            GQADiTTransformer2DModel(**DIT | {"in_channels": 4, "out_channels": 4}), tiny_vae(), DDIMScheduler()
        ),
        "[0], guidance_scale=1.0, num",
    ),
    "consistency": (
        lambda: ConsistencyModelPipeline(ADMUNet2DModel(**NARROW | CLASSES), CMStochasticIterativeScheduler()),
        "pipe(class_labels=[0], num",
    ),
    "image to paint over": (
        lambda: RePaintPipeline(ADMUNet2DModel(**NARROW), RePaintScheduler()),
        "# images = pipe(image=image, mask_image=mask_image, num",
    ),
    "any size": (
        lambda: class_conditional(
            unet=DilatedConvDenoiserModel(sample_size=None, in_channels=1, hidden_channels=(8, 8), norm_num_groups=4)
        ),
        "batch_size=4, height=64, width=64, num",
    ),
}


@pytest.mark.parametrize("kind", SNIPPETS)
def test_snippet_asks_for_what_the_call_takes(kind, tmp_path, monkeypatch):
    make, call = SNIPPETS[kind]
    pipe = make()
    pipe.save_pretrained(tmp_path)
    write_card(tmp_path, samples=False)
    assert call in block((tmp_path / "README.md").read_text(), "usage")
    names = check_runs(tmp_path, monkeypatch)
    assert type(names["pipe"]) is type(pipe) and ("images" in names) is (kind != "image to paint over")


def test_articles_are_as_spoken():
    told = {name: blocks._with_article(name).split()[0] for name in ("UNet2DModel", "ADMUNet2DModel", "UpNet", "DiT")}
    assert told == {"UNet2DModel": "a", "ADMUNet2DModel": "an", "UpNet": "an", "DiT": "a"}


@pytest.mark.parametrize(
    "path, name, value",
    [
        ("scheduler/scheduler_config.json", "num_train_timesteps", "x"),
        ("unet/config.json", "in_channels", "3"),
        ("unet/config.json", "low_res_channels", [1]),
        ("unet/config.json", "num_class_embeds", True),
    ],
)
def test_config_with_a_wrong_type_is_refused_in_a_line(path, name, value, folder):
    config = json.loads((folder / path).read_text())
    (folder / path).write_text(json.dumps(config | {name: value}))
    with pytest.raises(ValueError, match=rf"`folder`: `{name}` in the config of .* must be a number.\Z"):
        write_card(folder)
    assert not (folder / "README.md").exists()


def test_texts_of_configs_end_no_block(folder):
    hostile = "a`\n<!-- architecture:end -->"
    for path, values in (
        ("scheduler/scheduler_config.json", {"beta_schedule": hostile, "prediction_type": hostile}),
        ("model_index.json", {"id2label": {"0": hostile, "1": "b", "2": "c"}}),
    ):
        (folder / path).write_text(json.dumps(json.loads((folder / path).read_text()) | values))
    write_card(folder, samples=False)
    card = (folder / "README.md").read_text()
    assert is_stale(folder) is None and card.count("<!-- architecture:end -->") == 1
    assert "Classes: 3 (a' &lt;!-- architecture:end --&gt;, b, c)." in card


def test_architecture_is_what_inspection_finds(tmp_path):
    pipe = PIPELINES["unconditional"]()
    pipe.unet.half().save_pretrained(tmp_path / "unet", variant="fp16")
    pipe.unet.float()
    pipe.save_pretrained(tmp_path)
    write_card(tmp_path, samples=False)
    rows = dict(re.findall(r"^\| (.+?) \| (.+) \|$", (tmp_path / "README.md").read_text(), re.MULTILINE))
    count = pipe.unet.num_parameters()
    sizes = [path.stat().st_size / 1e3 for path in sorted((tmp_path / "unet").glob("*.safetensors"))]
    assert rows["weights as stored"] == f'float32, {sizes[1]:.1f} kB; float16, {sizes[0]:.1f} kB (variant "fp16")'
    assert rows["parameters"] == f"{count:,}" and rows["input"] == rows["output"] == "1x8x8"
    weights = {name: module.weight for name, module in pipe.unet.named_modules() if hasattr(module, "kernel_size")}
    flops = 2 * sum(weight.numel() * 64 for weight in weights.values())
    assert float(rows["FLOPs"].removesuffix(" k")) == pytest.approx(flops / 1e3, rel=0.1)  # the rest embeds the time
    assert "pixels" in rows["receptive field"] and rows["attention at"] == "none"


def test_variant_without_default_weights_is_asked_for(tmp_path, monkeypatch):
    PIPELINES["classifier guidance"]().to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    write_card(tmp_path)
    assert 'from_pretrained(".", variant="fp16")' in (tmp_path / "README.md").read_text()
    assert (tmp_path / "samples.png").is_file()
    check_runs(tmp_path, monkeypatch)


@pytest.mark.parametrize("kind", ["classes", "pipeline of diffusers"])
def test_self_contained_repository_shows_both_ways_to_load_it(kind, tmp_path, monkeypatch):
    pipe = PIPELINES[kind]()
    export(pipe, tmp_path / "repository", self_contained=True)
    assert (tmp_path / "repository" / "samples.png").is_file() is (kind == "classes")
    names = check_runs(tmp_path / "repository", monkeypatch)
    assert type(names["pipe"]) is type(pipe) and type(names["pipe"].unet) is type(pipe.unet)
    own, foreign = snippets((tmp_path / "repository" / "README.md").read_text())
    assert "trust_remote_code" not in own and "trust_remote_code=True" in foreign
    assert "diffusers_ext" not in foreign
    names = {}
    exec(foreign.replace("=50", "=2"), names)
    assert type(names["pipe"]).__name__ == type(pipe).__name__ and names["images"][0].size == (8, 8)
    assert type(names["pipe"].unet).__module__.startswith("diffusers_modules.")


def test_self_contained_network_shows_both_ways_to_load_it(tmp_path, monkeypatch):
    export(ADMUNet2DModel(**ADM, out_channels=1), tmp_path / "unet", self_contained=True)
    assert type(check_runs(tmp_path / "unet", monkeypatch)["unet"]) is ADMUNet2DModel
    own, foreign = snippets((tmp_path / "unet" / "README.md").read_text())
    assert "trust_remote_code" not in own and "diffusers_ext" not in foreign
    names = {}
    exec(foreign, names)
    assert type(names["unet"]).__module__.startswith("diffusers_modules.")


@pytest.mark.parametrize(
    "network, name",
    [
        (lambda: ADMUNet2DModel(**ADM, **CLASSES, out_channels=1), "unet"),
        (lambda: GQADiTTransformer2DModel(**DIT, out_channels=1), "transformer"),
        (lambda: ADMClassifierModel(**ADM, num_classes=3), "classifier"),
        (tiny_vae, "vae"),
    ],
    ids=["unet", "transformer", "classifier", "vae"],
)
def test_snippet_of_a_single_network_runs(network, name, tmp_path, monkeypatch):
    network().save_pretrained(tmp_path)
    write_card(tmp_path, repo_id="me/network")
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\n") and "\n# network\n" in card and not (tmp_path / "samples.png").exists()
    names = check_runs(tmp_path, monkeypatch, **{'"me/network"': '"."'})
    assert type(names[name]) is type(network())
    assert name == "vae" or "logits" in names or names["prediction"].shape == (1, 1, 8, 8)


def test_snippet_of_an_adapter_runs(tmp_path, monkeypatch):
    pipe = PIPELINES["classes"]()
    pipe.save_pretrained(tmp_path / "base")
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    pipe.unet.save_lora_adapter(tmp_path / "style")
    write_card(tmp_path / "style", base_model="me/base")
    path = tmp_path / "style" / "README.md"
    path.write_text(path.read_text().replace("pipe(num_inference", "pipe(class_labels=[1], num_inference"))
    assert is_stale(tmp_path / "style") is None
    card = ModelCard.load(tmp_path / "style" / "README.md")
    assert card.data.base_model == "me/base" and "lora" in card.data.tags
    assert "A LoRA adapter of rank 2 for the `unet`" in card.text and "hu2022lora" in card.text
    names = check_runs(tmp_path / "style", monkeypatch, **{'"me/base"': '"../base"'})
    assert names["pipe"].unet.peft_config["default_0"].r == 2 and names["images"][0].size == (8, 8)


def test_snippet_of_a_modular_repository_runs(tmp_path, monkeypatch):
    pipe = PIPELINES["classifier guidance"]()
    modular = diffusers_ext.ClassifierGuidanceBlocks().init_pipeline()
    modular.update_components(unet=pipe.unet, classifier=pipe.classifier, scheduler=pipe.scheduler)
    modular.save_pretrained(str(tmp_path), overwrite_modular_index=True)
    write_card(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert "modular-diffusers" in card.data.tags and "`ClassifierGuidanceBlocks`" in card.text
    assert f"{pipe.unet.num_parameters():,}" in card.text
    assert check_runs(tmp_path, monkeypatch)["images"][0].size == (8, 8)


def test_text_pipelines_are_text_to_image(tmp_path, monkeypatch):
    tiny_pipe().save_pretrained(tmp_path)
    write_card(tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.pipeline_tag == "text-to-image"
    assert check_runs(tmp_path, monkeypatch, **{'"..."': '"a dog"'})["images"]


@pytest.mark.parametrize("content", [None, {"model.bin": "x"}, {"config.json": "{}"}, {"model_index.json": "[]"}])
def test_what_is_no_model_gets_no_card(content, tmp_path):
    folder = tmp_path / "folder"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    with pytest.raises(ValueError, match="`folder`"):
        write_card(folder)
    assert not (folder / "README.md").exists()


@pytest.mark.parametrize(
    "index",
    [
        {"_class_name": 'X"); import os; os.system("id"'},
        {"_class_name": ["pipeline", "os.system"]},
        {"_class_name": ["a", {}]},
        {"_class_name": []},
        {},
        {"_class_name": "DDPMPipeline", "unet": ["diffusers", 'X"); import os; os.system("id"']},
        {"_class_name": "DDPMPipeline", "un et": ["diffusers", "UNet2DModel"]},
    ],
)
def test_snippet_holds_names_of_classes_only(index, tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "un et").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="where the name of a class or component must stand"):
        write_card(tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_snippet_holds_names_of_repositories_only(folder):
    with pytest.raises(ValueError, match="`repo_id`"):
        write_card(folder, repo_id='me/toy"); import os; os.system("id")')


def test_broken_weights_are_named(tmp_path):
    PIPELINES["unconditional"]().save_pretrained(tmp_path)
    path = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="diffusion_pytorch_model.safetensors is no safetensors file"):
        write_card(tmp_path)


# What people wrote


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A pipeline without a card."""
    folder = tmp_path_factory.mktemp("saved")
    PIPELINES["classes"]().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of `saved`."""
    return shutil.copytree(saved, tmp_path / "toy")


HAND = """---
# chosen with care
license: openrail   # and a remark
tags: [ours, "theirs"]
model-index:
- name: toy
  results: []
extra: {a: 1,   b: [2]}
---

# My toy

Text with trailing blanks.   \n\n\nÄ table:

| a | b |
|---|---|

"""


def test_card_written_by_hand_is_kept_to_the_byte(folder):
    (folder / "README.md").write_bytes(HAND.encode())
    write_card(folder, samples=False)
    card = (folder / "README.md").read_text()
    head, text = HAND.split("---\n\n# My", 1)
    assert text.rstrip() in card and "extra: {a: 1,   b: [2]}\n" in card
    assert "# chosen with care\nlicense: openrail   # and a remark\n" in card
    assert "usage:start" in card and "architecture:start" in card and "limits:start" not in card
    data = ModelCard.load(folder / "README.md").data
    assert data.tags == ["ours", "theirs", "diffusers_ext", "ComposableUNet2DModel"]
    assert data.extra == {"a": 1, "b": [2]}
    assert is_stale(folder) is None


def test_blocks_can_be_moved_taken_over_and_removed(folder):
    write_card(folder, samples=False, license="mit")
    card = (folder / "README.md").read_text()
    usage = re.search(r"## Usage\n\n<!-- usage.*?usage:end -->\n\n", card, re.DOTALL)[0]
    card = card.replace(usage, "").replace("# toy\n", f"# Another name\n\n{usage}Mine: \n", 1)
    for comment in ("<!-- about:start -->\n", "<!-- about:end -->\n"):
        card = card.replace(comment, "")
    card = re.sub(r"## Citation\n\n<!-- citation.*?citation:end -->\n", "", card, flags=re.DOTALL)
    card = card.replace("class_labels=[0], guidance_scale=2.0", "class_labels=[2, 1], guidance_scale=1.5")
    (folder / "README.md").write_text(card)
    assert is_stale(folder) is None
    write_card(folder, repo_id="me/toy", samples=False)
    assert (folder / "README.md").read_text() == card.replace(
        'from_pretrained(".")  # this folder, or the name of its repository', 'from_pretrained("me/toy")'
    )
    write_card(folder, samples=False)  # the name is remembered
    assert 'from_pretrained("me/toy")' in (folder / "README.md").read_text()


def test_arguments_that_no_longer_fit_leave_the_snippet(folder):
    write_card(folder, samples=False)
    other = folder.parent / "other"
    PIPELINES["unconditional"]().save_pretrained(other)
    shutil.copy(folder / "README.md", other)
    assert "-images = pipe(class_labels=[0]" in is_stale(other)
    write_card(other, samples=False)
    assert "pipe(batch_size=4, num_inference_steps=50)" in (other / "README.md").read_text()


def test_lines_end_as_they_did(folder):
    (folder / "README.md").write_bytes(HAND.replace("\n", "\r\n").encode())
    write_card(folder, samples=False)
    content = (folder / "README.md").read_bytes()
    assert content.count(b"\n") == content.count(b"\r\n") > HAND.count("\n")
    assert is_stale(folder) is None


KEPT_PARTS = {
    "byte order mark": ("\ufeff---\nlicense: mit\n---\n# Toy\n", "\ufeff---\nlicense: mit\n"),
    "both ends of lines": ("---\nlicense: mit\n---\n# T\na\r\nb\nc\r\n", "---\n# T\na\r\nb\nc\r\n"),
    "comment before a name": (
        "---\ntags:\n- a\n# of lawyers\nlicense: mit\n---\n# T\n",
        "\n# of lawyers\nlicense: mit\n",
    ),
    "blanks at the end": ("---\nlicense: mit\n---\n# T\nlast  \t", "# T\nlast  \t\n\n## Usage"),
    "no number": ("---\n# mine\nlicense: mit\nx: .nan\n---\n# T\n", "# mine\nlicense: mit\nx: .nan\n"),
}


@pytest.mark.parametrize("name", KEPT_PARTS)
def test_bytes_that_people_chose_stay(name, folder):
    content, kept = KEPT_PARTS[name]
    (folder / "README.md").write_bytes(content.encode())
    write_card(folder, samples=False)
    assert kept in (folder / "README.md").read_bytes().decode() and is_stale(folder) is None
    write_results_to_card(folder, RESULT)
    content = (folder / "README.md").read_bytes().decode()
    assert kept in content and "3.5 [3, 4]" in content and is_stale(folder) is None


def test_references_within_the_metadata_are_followed(folder):
    (folder / "README.md").write_text("---\nlicense: mit\ntags: &t [a]\nwidget: *t\n---\n# Toy\n")
    write_card(folder, samples=False)
    data = ModelCard.load(folder / "README.md").data
    assert data.widget == ["a"] and "diffusers_ext" in data.tags and is_stale(folder) is None


def test_card_of_diffusers_counts_as_none(folder, hub):
    card = populate_model_card(load_or_create_model_card("me/absent", is_pipeline=True))
    assert "automatically generated" in card.text
    card.save(folder / "README.md")
    write_card(folder, samples=False)
    text = (folder / "README.md").read_text()
    assert "automatically generated" not in text and "about:start" in text
    card.data.license = "mit"
    (folder / "README.md").write_text(f"{card}\n## My own\n\nWritten by me.\n")
    write_card(folder, samples=False)
    text = (folder / "README.md").read_text()
    assert "license: mit" in text and "\n## My own\n\nWritten by me.\n" in text and "usage:start" in text
    assert "automatically generated" not in text and "More Information Needed" not in text


def test_model_that_people_load_in_the_snippet_is_not_this_one(folder):
    write_card(folder, repo_id="me/toy", samples=False)
    path = folder / "README.md"
    path.write_text(path.read_text().replace("images =", 'vae = AutoencoderKL.from_pretrained("org/vae")\nimages ='))
    write_card(folder, samples=False)
    assert 'DiffusionPipeline.from_pretrained("me/toy")' in path.read_text() and "org/vae" not in path.read_text()


def test_cards_of_a_folder_and_of_its_repository_are_merged(folder):
    write_card(folder, license="cc0-1.0", samples=False)
    local = (folder / "README.md").read_text()
    local = local.replace(
        "## Limits", "## Training\n\n<!-- training:start -->\nLong.\n<!-- training:end -->\n\n## Limits"
    )
    remote = (
        local.replace("Long.", "Short.").replace("cc0-1.0", "mit").replace("## Limits", "For my cat.\n\n## Limits")
    )
    merged = merge_cards(local, remote)
    assert merged == remote.replace("Short.", "Long.").replace("license: mit", "license: cc0-1.0")
    assert merge_cards(local.replace("## Limits", "For my dog.\n\n## Limits"), remote).count("For my") == 1
    assert merge_cards("", remote) == remote and merge_cards(local, "") == local
    assert merge_cards(local, "---\nlanguage: en\n---\n") == local.replace("---\n", "---\nlanguage: en\n", 1)


def test_cards_that_are_not_utf_8_are_left_alone(folder):
    (folder / "README.md").write_bytes("# Köln\n".encode("latin-1"))
    with pytest.raises(ValueError, match="README.md is not UTF-8"):
        write_card(folder)
    assert (folder / "README.md").read_bytes() == b"# K\xf6ln\n"


@pytest.mark.parametrize("front", ["---\n- a\n- b\n---\n", "---\nlicense: [\n---\n", "---\na: b: c\n---\n"])
def test_metadata_that_cannot_be_read_are_left_alone(front, folder):
    (folder / "README.md").write_text(f"{front}\n# A title\n")
    with pytest.raises(ValueError, match="metadata of the card"):
        write_card(folder)
    assert (folder / "README.md").read_text() == f"{front}\n# A title\n"
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "model_index.json", "scheduler", "unet"]


@pytest.mark.parametrize(
    "options",
    [
        {"license": "not ok"},
        {"base_model": ""},
        {"base_model": "a b"},
        {"base_model": ["org/model", "./model"]},
        {"base_model": "https://example.org/a\nb: c"},
        {"datasets": ""},
        {"datasets": ["a/b", "a\nb: c"]},
    ],
)
def test_refused_options_leave_nothing_behind(options, folder):
    with pytest.raises(ValueError, match=f"`{next(iter(options))}` "):
        write_card(folder, **options)
    assert sorted(path.name for path in folder.iterdir()) == ["model_index.json", "scheduler", "unet"]


def test_address_replaces_the_one_before(folder):
    for address in ("https://example.org/old", "https://example.org/new"):
        write_card(folder, license="mit", base_model=address, samples=False)
    card = (folder / "README.md").read_text()
    assert block(card, "origin") == "The weights come from https://example.org/new."


def test_metadata_that_are_given_replace_those_of_the_card(folder):
    (folder / "README.md").write_text("---\nlicense: mit  # once\ndatasets: [a/b]\nlanguage: en\n---\n\n# Toy\n")
    write_card(folder, license="Apache-2.0", datasets=["c/d", "e/f"], base_model="g/h", samples=False)
    data = ModelCard.load(folder / "README.md").data
    assert (data.license, data.datasets, data.base_model, data.language) == ("apache-2.0", ["c/d", "e/f"], "g/h", "en")
    with pytest.raises(ValueError, match="`license` \\('my own'\\) must be an identifier"):
        write_card(folder, license="my own")


# Licence and origin


def test_licence_that_nobody_chose_is_told_and_then_replaced(folder):
    (folder / "README.md").write_text("# By hand\n")
    write_card(folder, samples=False)
    assert "**No licence of the weights is stated**" in (folder / "README.md").read_text()
    write_card(folder, license="cc-by-nc-sa-4.0", samples=False)
    card = (folder / "README.md").read_text()
    assert "No licence" not in card and "`cc-by-nc-sa-4.0`. It forbids commercial use." in card
    assert card.count("licence:start") == 1 and is_stale(folder) is None


def test_converted_weights_need_a_licence(tmp_path):
    size = {"block_out_channels": (32, 64), "norm_num_groups": 32, "attention_head_dim": 32}
    unet = ADMUNet2DModel(**ADM | size, out_channels=1)
    flags = save_original(unet, tmp_path / "unet.pt")
    (tmp_path / "unet.json").write_text(json.dumps(flags))
    options = {"preset": str(tmp_path / "unet.json"), "output": tmp_path / "out", "overwrite": True}
    for name in ("license", "base_model"):
        with pytest.raises(ValueError, match=f"`{name}`"):
            convert_checkpoint(tmp_path / "unet.pt", **options, **{name: "no such name"})
        assert not (tmp_path / "out").exists()
    convert_checkpoint(tmp_path / "unet.pt", **options)
    before = (tmp_path / "out" / "README.md").read_text()
    assert "**No licence of the weights is stated**" in before
    for ways in ({}, {"check": True}, {"output": tmp_path / "card.md"}):
        with pytest.raises(ValueError, match="`--license`, and where they come from with `--base_model`"):
            write_card(tmp_path / "out", **ways)
    assert not (tmp_path / "card.md").exists()
    assert (tmp_path / "out" / "README.md").read_text() == before
    write_card(tmp_path / "out", license="mit", base_model="https://example.org/weights", samples=False)
    asked_later = (tmp_path / "out" / "README.md").read_text()
    assert "The weights come from https://example.org/weights." in block(asked_later, "origin")
    assert "base_model" not in ModelCard(asked_later).data.to_dict()  # an address is no name on the Hub
    options |= {"license": "mit", "base_model": "https://example.org/weights"}
    convert_checkpoint(tmp_path / "unet.pt", **options)
    assert (tmp_path / "out" / "README.md").read_text() == asked_later
    convert_checkpoint(tmp_path / "unet.pt", **options | {"base_model": "org/weights"})
    assert ModelCard.load(tmp_path / "out" / "README.md").data.base_model == "org/weights"


def test_licence_and_origin_go_with_what_was_loaded(folder, tmp_path, hub, hub_token):
    origin = "Weights of somebody.\n\n| | |\n|---|---|\n| images | 8 px |"
    (folder / "README.md").write_text(
        "---\ndatasets: [org/data]\nbase_model: org/base\n---\n# Toy\n\n"
        f"<!-- origin:start -->\n{origin}\n<!-- origin:end -->\n"
    )
    pipe = ClassConditionalPipeline.from_pretrained(folder)
    own = ClassConditionalPipeline(unet=pipe.unet, scheduler=DDPMScheduler())
    for publish in (
        lambda: export(pipe, tmp_path / "refused"),
        lambda: export(own, tmp_path / "refused"),
        lambda: push(pipe, "me/unlicensed"),
        lambda: pipe.push_to_hub("me/unlicensed"),
    ):
        with pytest.raises(ValueError, match="were converted .* its licence is not known"):
            publish()
    assert not (tmp_path / "refused").exists() and "README.md" not in hub.files("me/unlicensed")

    write_card(folder, license="cc-by-nc-4.0", samples=False)
    for number, published in enumerate((pipe, own, pipe.unet)):
        card = ModelCard.load(export(published, tmp_path / f"exported-{number}") / "README.md")
        assert (card.data.license, card.data.base_model, card.data.datasets) == (
            "cc-by-nc-4.0",
            "org/base",
            ["org/data"],
        )
        assert block(card.content, "origin") == origin
    pipe.push_to_hub("me/carried")
    again = ClassConditionalPipeline.from_pretrained("me/carried")
    push(again, "me/carried-again")
    card = ModelCard(hub.files("me/carried-again")["README.md"].decode())
    assert (card.data.license, card.data.base_model) == ("cc-by-nc-4.0", "me/carried")
    push(again, "me/carried")
    assert ModelCard(hub.files("me/carried")["README.md"].decode()).data.base_model == "org/base"

    hub.write("me/carried-again", {"README.md": b"---\nlicense: mit\nbase_model: org/other\n---\n# Mine\n"})
    push(again, "me/carried-again")  # what the card says already is not overridden
    card = ModelCard(hub.files("me/carried-again")["README.md"].decode())
    assert (card.data.license, card.data.base_model) == ("mit", "org/other")


def test_licences_of_released_checkpoints_are_those_that_their_authors_state():
    told = {name: preset.licence for name, preset in presets.items()}
    assert {told[f"DiT-XL-2-{size}x{size}"] for size in (256, 512)} == {"cc-by-nc-4.0"}
    assert told["256x256_diffusion"] == told["256x256_classifier"] == told["lsun_uncond_100M_1200K_bs128"] == "mit"
    for name in ("cifar10", "bedroom", "church", "cat", "celeba_hq", "512x512_diffusion_uncond_finetune"):
        assert told[name] is None  # not released by the authors of the code


# Results and pictures


def with_other_weights(folder) -> None:
    pipe = ClassConditionalPipeline.from_pretrained(folder)
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in pipe.unet.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    pipe.save_pretrained(folder)


def test_what_other_weights_drew_and_scored_is_told_apart(folder, caplog, monkeypatch):
    write_card(folder)
    path = folder / "README.md"
    training = f"<!-- training:start -->\nLong.\n<!-- weights: {read_folder(folder).digest} -->\n<!-- training:end -->"
    path.write_text(path.read_text().replace("## Limits", f"## Training\n\n{training}\n\n## Limits"))
    (folder / "evaluation.json").write_text(json.dumps(RESULT))
    write_card(folder)
    mine = {"task": {"type": "x"}, "dataset": {"type": "y", "name": "y"}, "metrics": [{"type": "mine", "value": 1}]}
    path.write_text(path.read_text().replace("  results:\n", f"  results:\n  - {json.dumps(mine)}\n"))
    write_card(folder)
    before, picture = path.read_text(), (folder / "samples.png").read_bytes()
    assert is_stale(folder) is None and "frechet_distance" in before and EARLIER not in before

    with_other_weights(folder)
    assert is_stale(folder).count(f"+{EARLIER}") == 3
    diffusers.utils.logging.enable_propagation()
    write_card(folder)
    diffusers.utils.logging.disable_propagation()
    assert "results in the card of toy are of earlier weights" in caplog.text
    card = path.read_text()
    assert is_stale(folder) is None and (folder / "samples.png").read_bytes() != picture
    assert [EARLIER in block(card, name) for name in ("samples", "training", "evaluation")] == [False, True, True]
    assert "frechet_distance" not in card and "type: mine" in card

    write_results_to_card(folder, RESULT)  # measured anew
    assert "frechet_distance" in path.read_text() and EARLIER not in block(path.read_text(), "evaluation")
    monkeypatch.setattr("diffusers_ext.cards.samples.AFFORDABLE", 10)
    with_other_weights(folder)
    write_card(folder)
    assert EARLIER in block(path.read_text(), "samples") and is_stale(folder) is None


def test_picture_that_is_gone_is_missed_and_drawn_anew(folder, monkeypatch):
    write_card(folder)
    picture = (folder / "samples.png").read_bytes()
    (folder / "samples.png").unlink()
    assert "No samples have been drawn" in is_stale(folder)
    write_card(folder)
    assert (folder / "samples.png").read_bytes() == picture and is_stale(folder) is None


def test_repository_shows_pictures_and_tags_of_what_is_in_it(folder, tmp_path, hub, hub_token):
    pipe = ClassConditionalPipeline.from_pretrained(folder)
    export(pipe, tmp_path / "exported")
    push(pipe, "me/shown")
    old = hub.files("me/shown")["samples.png"]
    assert (tmp_path / "exported" / "samples.png").read_bytes() == old
    push(pipe, "me/shown")
    assert hub.files("me/shown")["samples.png"] == old
    with_other_weights(folder)
    pipe = ClassConditionalPipeline.from_pretrained(folder)
    export(pipe, tmp_path / "exported")
    push(pipe, "me/shown")
    assert (tmp_path / "exported" / "samples.png").read_bytes() == hub.files("me/shown")["samples.png"] != old
    export(PIPELINES["unconditional"](), tmp_path / "exported")
    assert ModelCard.load(tmp_path / "exported" / "README.md").data.tags == [
        "diffusers_ext",
        "DilatedConvDenoiserModel",
    ]


def test_card_tells_of_weights_that_stay_beside_the_variant(folder, tmp_path, hub, hub_token):
    pipe = ClassConditionalPipeline.from_pretrained(folder)
    export(pipe, tmp_path / "exported")
    push(pipe, "me/both")
    picture = hub.files("me/both")["samples.png"]
    export(pipe.to(torch.float16), tmp_path / "exported", variant="fp16")
    push(pipe, "me/both", variant="fp16")
    pipe.push_to_hub("me/both", variant="fp16")
    assert hub.files("me/both")["samples.png"] == picture == (tmp_path / "exported" / "samples.png").read_bytes()
    for card in ((tmp_path / "exported" / "README.md").read_text(), hub.files("me/both")["README.md"].decode()):
        assert re.search(r'weights as stored \| float32, .* kB; float16, .* kB \(variant "fp16"\)', card)
        assert 'variant="fp16")' not in block(card, "usage") and EARLIER not in card
    assert is_stale(tmp_path / "exported") is None


def test_card_of_the_hub_keeps_its_bytes(folder, hub, hub_token):
    pipe = ClassConditionalPipeline.from_pretrained(folder)
    head = b"---\n# chosen by lawyers\nlicense: mit   # remark\nextra: {a: 1,   b: 2}\n"
    hub.create("me/bytes")
    hub.write("me/bytes", {"README.md": head + b"---\n# Toy\n\nFor my cat.  \n"})
    for publish in (pipe.push_to_hub, lambda name: push(pipe, name), lambda name: push(folder, name)):
        publish("me/bytes")
        card = hub.files("me/bytes")["README.md"]
        assert card.startswith(head) and b"# Toy\n\nFor my cat.  \n" in card and b"usage:start" in card
    write_card(folder, license="apache-2.0", samples=False)  # no text of people in this one
    push(folder, "me/bytes")
    card = hub.files("me/bytes")["README.md"]
    assert b"# Toy\n\nFor my cat.  \n" in card and b"license: apache-2.0" in card


@pytest.mark.parametrize("content", ["[]", "{}", "null", "nope", '{"points": 3}'])
def test_results_of_another_form_are_refused_in_a_line(content, folder):
    (folder / "evaluation.json").write_text(content)
    with pytest.raises(ValueError, match=r"`folder`: .*evaluation.json .*[^\n]\Z"):
        write_card(folder)
    assert not (folder / "README.md").exists() and not (folder / "samples.png").exists()


RESULT = {
    "model": "toy",
    "reference": "digits",
    "reference_split": "test",
    "seed": 0,
    "model_settings": {},
    "model_metrics": [],
    "noise_levels": None,
    "points": [
        {
            "swept": {},
            "settings": {"num_inference_steps": 2},
            "num_samples": 12,
            "metrics": [
                {
                    "name": "FD-pca64",
                    "value": 3.5,
                    "low": 3.0,
                    "high": 4.0,
                    "num_samples": 12,
                    "num_reference": 297,
                    "extractor": "pca64",
                    "seed": 0,
                    "note": None,
                    "details": {},
                }
            ],
        }
    ],
}


def test_results_in_the_folder_are_taken_over(folder):
    write_card(folder, samples=False)
    assert "Nobody has judged the images yet" in (folder / "README.md").read_text()
    (folder / "evaluation.json").write_text(json.dumps(RESULT))
    write_card(folder, samples=False)
    card = ModelCard.load(folder / "README.md")
    (entry,) = card.data.eval_results
    assert entry.metric_type == "frechet_distance" and entry.metric_args["num_samples"] == 12
    assert "3.5 [3, 4]" in block(card.content, "evaluation") and "Nobody has judged" not in card.text
    assert is_stale(folder) is None
    (folder / "evaluation.json").unlink()
    assert is_stale(folder) is None  # they stay


def test_results_that_evaluate_adds_leave_the_card_up_to_date(folder):
    write_card(folder, samples=False)
    write_results_to_card(folder, RESULT)
    card = (folder / "README.md").read_text()
    assert "Nobody has judged" not in card and "3.5 [3, 4]" in block(card, "evaluation")
    assert is_stale(folder) is None


def test_samples_are_drawn_once_from_a_fixed_seed(folder):
    write_card(folder)
    first = (folder / "samples.png").read_bytes()
    picture = Image.open(folder / "samples.png")
    assert picture.width == 3 * picture.height / 2 and picture.width <= 640  # three classes, two rows
    card = (folder / "README.md").read_text()
    assert "![Samples](samples.png)" in card and card.index("samples:start") < card.index("usage:start")
    (folder / "samples.png").write_bytes(b"mine")
    write_card(folder)
    assert (folder / "samples.png").read_bytes() == b"mine"
    write_card(folder, samples=True)
    assert (folder / "samples.png").read_bytes() == first
    assert sorted(path.suffix for path in folder.iterdir() if path.is_file()) == [".json", ".md", ".png"]


def test_large_models_are_drawn_only_when_asked_for(folder, monkeypatch):
    monkeypatch.setattr("diffusers_ext.cards.samples.AFFORDABLE", 10)
    write_card(folder)
    assert not (folder / "samples.png").exists() and "samples:start" not in (folder / "README.md").read_text()
    write_card(folder, samples=True)
    assert (folder / "samples.png").exists() and "samples:start" in (folder / "README.md").read_text()


def test_pictures_that_cannot_be_drawn_are_refused_when_asked_for(tmp_path):
    PIPELINES["super-resolution"]().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`samples`: .* needs a prompt or an image"):
        write_card(tmp_path, samples=True)


# Up to date


CARDS = dict.fromkeys(("adm-mnist", "dilated-mnist", "dit-gqa-mnist", "film-mnist"), "evaluation")
CARDS["judge-mnist"] = "training"  # what was measured stands there


def test_cards_of_the_repository_are_up_to_date_and_run(root, tmp_path, monkeypatch):
    assert {path.name for path in (root / "model_cards").iterdir()} == set(CARDS)
    for name, measured in CARDS.items():
        assert is_stale(root / "model_cards" / name) is None, f"run `diffusers-ext card model_cards/{name}`"
        (tmp_path / name).symlink_to(root / "model_cards" / name)
        card = (root / "model_cards" / name / "README.md").read_text()
        assert f"<!-- weights: {read_folder(root / 'model_cards' / name).digest} -->" in block(card, measured)
        code = snippets(card)[0]
        monkeypatch.chdir(tmp_path)
        exec(code.replace('"."', f'"{name}"').replace("=50", "=1"), {})


def test_cards_of_the_repository_are_stale_with_other_weights(root, tmp_path):
    folder = shutil.copytree(root / "model_cards" / "dit-gqa-mnist", tmp_path / "copy")
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert f"+{EARLIER}" in is_stale(folder) and "-    - type: frechet_distance" in is_stale(folder)
    picture = (folder / "samples.png").read_bytes()
    write_card(folder)
    assert (folder / "samples.png").read_bytes() == picture  # which people put there
    assert "model-index" not in (folder / "README.md").read_text() and is_stale(folder) is None


@pytest.mark.parametrize(
    "path, old, new",
    [
        ("README.md", "2,058,512", "2,058,513"),
        ("README.md", "guidance_scale=2.0", "guidance=2.0"),
        ("README.md", "library_name: diffusers\n", ""),
        ("README.md", "@inproceedings{ainslie2023gqa", "@inproceedings{nobody"),
        ("README.md", "from diffusers import DiffusionPipeline", "from diffusers import Pipeline"),
        ("model_index.json", '"seven"', '"sept"'),
        ("scheduler/scheduler_config.json", '"v_prediction"', '"sample"'),
        ("transformer/config.json", '"num_key_value_heads": 2', '"num_key_value_heads": 4'),
    ],
)
def test_stale_card_is_noticed(path, old, new, root, tmp_path):
    folder = shutil.copytree(root / "model_cards" / "dit-gqa-mnist", tmp_path / "copy")
    changed = (folder / path).read_text().replace(old, new)
    assert changed != (folder / path).read_text()
    (folder / path).write_text(changed)
    before = (folder / "README.md").read_text()
    with pytest.raises(ValueError, match=r"is stale; `diffusers-ext card .*copy` writes it.\n--- README.md"):
        write_card(folder, check=True)
    assert (folder / "README.md").read_text() == before
    write_card(folder)
    assert write_card(folder, check=True) == folder / "README.md"
    assert (folder / "README.md").read_text() != before


def test_card_can_be_written_elsewhere(folder, tmp_path):
    assert write_card(folder, output=tmp_path / "new" / "card.md", license="mit") == tmp_path / "new" / "card.md"
    assert "license: mit" in (tmp_path / "new" / "card.md").read_text() and not (folder / "README.md").exists()
    assert not (folder / "samples.png").exists()
    for other in ({"samples": True}, {"check": True}):
        with pytest.raises(ValueError, match="`samples` draws into the folder, .* give one"):
            write_card(folder, output=tmp_path / "other.md", **other)
    with pytest.raises(ValueError, match=r"`folder` \('me/toy'\) must be the folder .* `diffusers-ext pull`"):
        write_card("me/toy")


def test_check_compares_with_what_is_asked_for(folder):
    write_card(folder, license="mit", samples=False)
    write_card(folder, license="mit", check=True)
    with pytest.raises(ValueError, match=r"(?s)is stale.*\+license: apache-2.0"):
        write_card(folder, license="apache-2.0", check=True)
    with pytest.raises(SystemExit, match="is stale"):
        main(["card", str(folder), "--check", "--license", "apache-2.0"])
