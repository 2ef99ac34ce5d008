"""Any model of ours in any place of diffusers, and theirs in ours: pipelines, `from_pipe`, LoRA, quantised weights."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig
from torch import nn

from diffusers import (
    AutoencoderKL,
    AutoModel,
    AutoPipelineForText2Image,
    ClassifierFreeGuidance,
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    LDMPipeline,
    LDMSuperResolutionPipeline,
    PipelineQuantizationConfig,
    PNDMPipeline,
    PNDMScheduler,
    RePaintPipeline,
    RePaintScheduler,
    StableDiffusionPipeline,
    TorchAoConfig,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.utils import is_torchao_available, is_torchao_version

from diffusers_ext import (
    ADMClassifierModel,
    ADMUNet2DModel,
    ClassConditionalPipeline,
    ClassifierGuidedPipeline,
    ComposableUNet2DModel,
    DDPMUNet2DModel,
    DilatedConvDenoiserModel,
    GQADiTTransformer2DModel,
)
from diffusers_ext.hub import push


SIZE = {"sample_size": 8, "in_channels": 3, "out_channels": 3}
UNET = {**SIZE, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
ATTENTION = {"attention_resolutions": (4,), "attention_head_dim": 16}
BLOCKS = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
TRANSFORMER = {"patch_size": 2, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
NETWORKS = {
    "adm": (ADMUNet2DModel, {**UNET, **ATTENTION}),
    "composable": (ComposableUNet2DModel, {**UNET, **ATTENTION}),
    "ddpm": (DDPMUNet2DModel, {**UNET, "attention_resolutions": (4,)}),
    "dilated": (DilatedConvDenoiserModel, {**SIZE, "hidden_channels": (16,) * 3, "norm_num_groups": 8}),
    "gqa-dit": (GQADiTTransformer2DModel, {**SIZE, **TRANSFORMER, "num_key_value_heads": 1}),
}
CLASSES = {"num_class_embeds": 4, "null_class": True}
LABELS = {0: "tench, Tinca tinca", 3: "seven"}


def build(model_class, config):
    """A network of which no layer is silent; the same at every call."""
    torch.manual_seed(0)
    model = model_class(**config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def network(name, **changes):
    model_class, config = NETWORKS[name]
    return build(model_class, {**config, **changes})


def classifier():
    config = {key: value for key, value in {**UNET, **ATTENTION}.items() if key != "out_channels"}
    return build(ADMClassifierModel, {**config, "num_classes": 4})


def decoder(model_class=AutoencoderKL, **config):
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return build(model_class, {"block_out_channels": (8, 8), "norm_num_groups": 4, **blocks, **config})


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def ours(model, **components):
    """Our pipeline around one of our networks, with classes."""
    slot = "transformer" if isinstance(model, GQADiTTransformer2DModel) else "unet"
    return quiet(ClassConditionalPipeline(**{slot: model, "scheduler": DDIMScheduler(), **components}))


def draw(pipe, **arguments):
    arguments = {"num_inference_steps": 3, "output_type": "np", **arguments}
    images = pipe(**arguments, generator=torch.Generator().manual_seed(0)).images
    assert np.isfinite(images).all() and images.std() > 0.01  # neither broken nor empty
    return images


def assert_same(actual, expected, atol=1e-5):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


@pytest.fixture(params=NETWORKS)
def name(request):
    return request.param


# Our networks in pipelines of diffusers


@pytest.mark.parametrize("classes", [{}, CLASSES], ids=["unconditional", "null class"])
@pytest.mark.parametrize(
    "pipeline_class, scheduler",
    [
        (DDPMPipeline, DDPMScheduler()),
        (DDIMPipeline, DDIMScheduler(clip_sample=False)),
        (PNDMPipeline, PNDMScheduler(skip_prk_steps=True)),
    ],
    ids=["DDPMPipeline", "DDIMPipeline", "PNDMPipeline"],
)
def test_unconditional_pipelines(name, pipeline_class, scheduler, classes, tmp_path):
    theirs = quiet(pipeline_class(unet=network(name, **classes), scheduler=scheduler))
    images = draw(theirs, batch_size=2)
    theirs.save_pretrained(tmp_path)
    loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path, use_safetensors=True))
    assert type(loaded) is pipeline_class and type(loaded.unet) is NETWORKS[name][0]
    assert_same(draw(loaded, batch_size=2), images)
    assert_same(draw(quiet(ClassConditionalPipeline.from_pipe(theirs)), batch_size=2), images)


def test_learned_variance_in_ddpm_pipeline(name):
    theirs = quiet(DDPMPipeline(network(name, out_channels=6), DDPMScheduler(variance_type="learned_range")))
    assert_same(draw(quiet(ClassConditionalPipeline.from_pipe(theirs))), draw(theirs), atol=1e-3)


@pytest.mark.parametrize("out_channels", [4, 8], ids=["prediction", "learned sigma"])
def test_dit_pipeline(out_channels, tmp_path):
    transformer = network("gqa-dit", in_channels=4, out_channels=out_channels, num_class_embeds=1000, null_class=True)
    vae, scheduler = decoder(latent_channels=4), DDIMScheduler(clip_sample=False)
    theirs = quiet(DiTPipeline(transformer, vae, scheduler, id2label=LABELS))
    theirs.save_pretrained(tmp_path)
    loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path, use_safetensors=True))
    assert type(loaded) is DiTPipeline and type(loaded.transformer) is GQADiTTransformer2DModel
    class_labels = theirs.get_label_ids(["Tinca tinca", "seven"])
    assert class_labels == [0, 3]
    for guidance_scale in (1.0, 4.0):
        arguments = {"class_labels": class_labels, "guidance_scale": guidance_scale}
        images = draw(theirs, **arguments)
        assert_same(draw(loaded, **arguments), images)
        for same in (ClassConditionalPipeline.from_pipe(theirs), ClassConditionalPipeline.from_pretrained(tmp_path)):
            assert_same(draw(quiet(same), **arguments), images, atol=1e-4)


def test_dit_pipeline_guides_networks_of_a_thousand_classes_only():
    transformer = network("gqa-dit", in_channels=4, out_channels=4, **CLASSES)
    theirs = quiet(DiTPipeline(transformer, decoder(latent_channels=4), DDIMScheduler(clip_sample=False)))
    with pytest.raises(ValueError, match="`class_labels` has 1000, .* guide with `ClassConditionalPipeline`"):
        draw(theirs, class_labels=[3])
    images = draw(quiet(ClassConditionalPipeline.from_pipe(theirs)), class_labels=[3], guidance_scale=1.0)
    assert_same(draw(theirs, class_labels=[3], guidance_scale=1.0), images, atol=1e-4)


def test_consistency_model_pipeline(name):
    theirs = quiet(ConsistencyModelPipeline(network(name, **CLASSES), CMStochasticIterativeScheduler()))
    three, none = (draw(theirs, class_labels=label, num_inference_steps=1) for label in (3, 0))
    assert three.shape == (1, 8, 8, 3) and not np.array_equal(three, none)
    assert_same(draw(theirs, class_labels=[3], num_inference_steps=1), three)


def test_latent_diffusion_pipelines(name):
    vae, scheduler = decoder(VQModel), DDIMScheduler()
    assert draw(quiet(LDMPipeline(vae, network(name), scheduler)), batch_size=2).shape == (2, 16, 16, 3)
    enlarging = quiet(LDMSuperResolutionPipeline(vae, network(name, in_channels=6), scheduler))
    assert draw(enlarging, image=torch.zeros(1, 3, 8, 8)).shape == (1, 16, 16, 3)


def test_repaint_pipeline(name):
    theirs = quiet(RePaintPipeline(network(name), RePaintScheduler()))
    image, known = torch.linspace(-1, 1, 192).reshape(1, 3, 8, 8), torch.ones(1, 1, 8, 8)
    known[..., :4] = 0
    images = draw(theirs, image=image, mask_image=known, jump_length=1, jump_n_sample=1, eta=0.0)
    assert_same(images[0, :, 4:], (image / 2 + 0.5)[0, :, :, 4:].permute(1, 2, 0), atol=0.02)


def test_pipelines_of_diffusers_on_the_hub(hub, hub_token):
    transformer = network("gqa-dit", in_channels=4, num_class_embeds=1000, null_class=True, out_channels=8)
    dit = DiTPipeline(transformer, decoder(latent_channels=4), DDIMScheduler(clip_sample=False))
    cases = {
        "me/ddpm": (DDPMPipeline(network("adm"), DDPMScheduler()), {}),
        "me/ddpm-classes": (DDPMPipeline(network("ddpm", **CLASSES), DDPMScheduler()), {}),
        "me/ddim": (DDIMPipeline(network("composable"), DDIMScheduler()), {}),
        "me/dit": (dit, {"class_labels": [7]}),
    }
    for repo_id, (pipe, arguments) in cases.items():
        push(pipe, repo_id)
        loaded = quiet(DiffusionPipeline.from_pretrained(repo_id, use_safetensors=True))
        assert type(loaded) is type(pipe)
        assert_same(draw(loaded, **arguments), draw(quiet(pipe), **arguments))
        assert hub.files(repo_id)["samples.png"]
        call = "batch_size=4" if not arguments else "class_labels=[0]"
        assert f"pipe({call}".encode() in hub.files(repo_id)["README.md"]

    # By diffusers' own method: our card where a network is ours.
    pipe = cases["me/ddpm"][0]
    pipe.push_to_hub("me/ddpm-own")
    assert b"## Usage" in hub.files("me/ddpm-own")["README.md"]
    assert_same(draw(quiet(DiffusionPipeline.from_pretrained("me/ddpm-own"))), draw(quiet(pipe)))
    DDPMPipeline(unet_of_diffusers(), DDPMScheduler()).push_to_hub("me/theirs-own")
    assert b"[More Information Needed]" in hub.files("me/theirs-own")["README.md"]
    # A pipeline whose code came with it leaves that code behind, and is one of ours again.
    guided = quiet(ClassConditionalPipeline(unet=network("adm"), scheduler=DDPMScheduler()))
    push(guided, "me/coded", self_contained=True)
    quiet(DiffusionPipeline.from_pretrained("me/coded", trust_remote_code=True)).push_to_hub("me/uncoded")
    assert_same(draw(quiet(DiffusionPipeline.from_pretrained("me/uncoded"))), draw(guided))

    # Of 4 classes, where `DiTPipeline` knows 1000; and one that cannot draw, since nobody says which class.
    vae, scheduler = decoder(latent_channels=4), DDIMScheduler(clip_sample=False)
    push(DiTPipeline(network("gqa-dit", in_channels=4, **CLASSES, out_channels=4), vae, scheduler), "me/dit-4")
    assert hub.files("me/dit-4")["samples.png"]
    push(DDPMPipeline(network("adm", num_class_embeds=4), DDPMScheduler()), "me/mute")
    assert "samples.png" not in hub.files("me/mute")


@pytest.mark.parametrize("kind", ["theirs", "class conditional", "classifier guided"])
def test_offloading_changes_nothing(kind, name, tmp_path):
    model, arguments = network(name, **CLASSES), {}
    if kind == "theirs":
        pipe = quiet(DDPMPipeline(model, DDPMScheduler()))
    elif kind == "class conditional":
        pipe, arguments = ours(model, vae=decoder(latent_channels=3)), {"class_labels": [3]}
    else:
        pipe = quiet(ClassifierGuidedPipeline(model, DDIMScheduler(), classifier()))
        arguments = {"class_labels": [3]}
    expected = draw(pipe, **arguments)
    pipe.save_pretrained(tmp_path)
    pipe.enable_attention_slicing()
    pipe.enable_model_cpu_offload(device="cpu")
    assert_same(draw(pipe, **arguments), expected)
    for options in ({"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}):
        loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path, device_map="cpu", use_safetensors=True))
        assert_same(draw(loaded, **arguments), expected)
        loaded.enable_group_offload(onload_device=torch.device("cpu"), **options)
        assert_same(draw(loaded, **arguments), expected)


# Networks of diffusers in our pipelines


def unet_of_diffusers(**changes):
    return build(UNet2DModel, {**UNET, **BLOCKS, **changes})


def test_folder_of_diffusers_in_our_pipelines(tmp_path):
    theirs = quiet(DDPMPipeline(unet_of_diffusers(), DDPMScheduler()))
    theirs.save_pretrained(tmp_path)
    expected = draw(theirs, batch_size=2)
    same = quiet(ClassConditionalPipeline.from_pretrained(tmp_path, use_safetensors=True))
    assert_same(draw(same, batch_size=2), expected)
    unet = AutoModel.from_pretrained(str(tmp_path), subfolder="unet", use_safetensors=True)
    assert type(unet) is UNet2DModel
    scheduler = DDPMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert_same(draw(ours(unet, scheduler=scheduler), batch_size=2), expected)

    guided = ClassifierGuidedPipeline.from_pretrained(tmp_path, classifier=classifier(), use_safetensors=True)
    assert_same(draw(quiet(guided), class_labels=[1, 2], guidance_scale=0.0), expected)
    images = draw(guided, class_labels=[1, 2])
    guided.save_pretrained(tmp_path / "guided")
    index = json.loads((tmp_path / "guided" / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DModel"]
    assert index["classifier"] == ["diffusers_ext", "ADMClassifierModel"]
    loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path / "guided", use_safetensors=True))
    assert_same(draw(loaded, class_labels=[1, 2]), images)


def test_our_network_in_a_folder_of_diffusers(name, tmp_path):
    DDPMPipeline(unet_of_diffusers(), DDPMScheduler()).save_pretrained(tmp_path)
    unet = network(name)
    pipe = quiet(DiffusionPipeline.from_pretrained(tmp_path, unet=unet, use_safetensors=True))
    assert type(pipe) is DDPMPipeline and pipe.unet is unet
    pipe.save_pretrained(tmp_path / "mixed")
    loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path / "mixed", use_safetensors=True))
    assert_same(draw(loaded), draw(pipe))


def test_transformer_of_diffusers(tmp_path):
    config = {"sample_size": 8, "in_channels": 4, "out_channels": 8, "num_embeds_ada_norm": 1000, **TRANSFORMER}
    vae, scheduler = decoder(latent_channels=4), DDIMScheduler(clip_sample=False)
    theirs = quiet(DiTPipeline(build(DiTTransformer2DModel, config), vae, scheduler))
    theirs.save_pretrained(tmp_path)
    loaded = quiet(ClassConditionalPipeline.from_pretrained(tmp_path, use_safetensors=True))
    assert type(loaded.transformer) is DiTTransformer2DModel
    assert_same(draw(loaded, class_labels=[7, 8]), draw(theirs, class_labels=[7, 8]), atol=2e-4)


def test_stable_diffusion_in_our_pipeline():
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    heads = {"block_out_channels": (16,), "cross_attention_dim": 12, "attention_head_dim": 2}
    unet = build(UNet2DConditionModel, {**UNET, **blocks, **heads, "in_channels": 4, "out_channels": 4})
    components = {"vae": decoder(latent_channels=4), "unet": unet, "scheduler": DDIMScheduler(clip_sample=False)}
    absent = dict.fromkeys(["text_encoder", "tokenizer", "safety_checker", "feature_extractor"])
    theirs = quiet(StableDiffusionPipeline(**components, **absent, requires_safety_checker=False))
    random = torch.Generator().manual_seed(1)
    texts = {name: torch.randn(1, 6, 12, generator=random) for name in ("prompt_embeds", "negative_prompt_embeds")}
    expected = draw(theirs, **texts, guidance_scale=3.0)
    assert_same(draw(quiet(ClassConditionalPipeline.from_pipe(theirs)), **texts, guidance_scale=3.0), expected, 1e-4)


def test_loaded_pipelines_draw_the_same_bits(name, tmp_path):
    vae = decoder(latent_channels=3)
    pipes = [
        ours(network(name, **CLASSES), vae=vae),
        ClassifierGuidedPipeline(network(name), DDPMScheduler(), classifier()),
    ]
    for number, pipe in enumerate(map(quiet, pipes)):
        pipe.save_pretrained(tmp_path / str(number))
        loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path / str(number), use_safetensors=True))
        for class_labels in ([3], [3, 1]):  # kernels for one image are the ones that ask where weights lie
            arguments = {"class_labels": class_labels, "guidance_scale": 1.0}
            np.testing.assert_array_equal(draw(loaded, **arguments), draw(pipe, **arguments))


def test_weights_come_to_lie_where_torch_puts_them():
    model = network("dilated")
    expected = [x.clone() for x in model.parameters()]
    for x in model.parameters():
        bytes_read = bytearray(4 + 4 * x.numel())
        x.data = torch.frombuffer(bytes_read, dtype=torch.float32, offset=4).view_as(x).copy_(x)
    assert any(x.data_ptr() % 64 for x in model.parameters())
    pipe = DDPMPipeline(model, DDPMScheduler())
    assert any(x.data_ptr() % 64 for x in model.parameters())
    ClassConditionalPipeline.from_pipe(pipe)
    assert not any(x.data_ptr() % 64 for x in model.parameters())
    assert all(map(torch.equal, model.parameters(), expected))


@pytest.mark.parametrize("slot", ["unet", "guide_model"])
def test_weights_of_assigned_networks_are_moved_too(slot):
    pipe, other = ours(network("dilated")), network("dilated")
    for x in other.parameters():
        x.data = torch.zeros(x.numel() + 1)[1:].view_as(x).copy_(x)
    assert any(x.data_ptr() % 64 for x in other.parameters())
    setattr(pipe, slot, other)
    assert getattr(pipe, slot) is other and not any(x.data_ptr() % 64 for x in other.parameters())


# Components that are assigned


def test_components_assigned_to_empty_places_are_saved(tmp_path):
    pipe = ours(network("adm", **CLASSES))
    parts = {"guider": ClassifierFreeGuidance(guidance_scale=2.0), "vae": decoder(latent_channels=3)}
    parts["guide_model"] = network("dilated", num_class_embeds=4)
    for name, part in parts.items():
        setattr(pipe, name, part)
    assert {name: getattr(pipe, name) for name in parts} == parts == {name: pipe.components[name] for name in parts}
    pipe.unet, pipe.transformer = None, network("gqa-dit", **CLASSES)
    pipe.save_pretrained(tmp_path / "latents")
    index = json.loads((tmp_path / "latents" / "model_index.json").read_text())
    assert {name: index[name] for name in ("guider", "vae", "guide_model", "unet", "transformer")} == {
        "guider": ["diffusers", "ClassifierFreeGuidance"],
        "vae": ["diffusers", "AutoencoderKL"],
        "guide_model": ["diffusers_ext", "DilatedConvDenoiserModel"],
        "unet": [None, None],
        "transformer": ["diffusers_ext", "GQADiTTransformer2DModel"],
    }
    loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path / "latents", use_safetensors=True))
    np.testing.assert_array_equal(draw(loaded, class_labels=[3]), draw(pipe, class_labels=[3]))

    pipe = quiet(ClassifierGuidedPipeline(network("adm"), DDIMScheduler()))
    pipe.classifier = classifier()
    shared = quiet(ClassifierGuidedPipeline.from_pipe(pipe))
    for number, each in enumerate((pipe, shared)):
        each.save_pretrained(tmp_path / str(number))
        loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path / str(number), use_safetensors=True))
        np.testing.assert_array_equal(draw(loaded, class_labels=[3]), draw(pipe, class_labels=[3]))
    pipe.classifier = None
    pipe.save_pretrained(tmp_path / "none")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "none", use_safetensors=True)
    assert loaded.classifier is None and not (tmp_path / "none" / "classifier").exists()


def test_compiled_networks_are_assigned_and_saved(tmp_path):
    pipe = quiet(ClassifierGuidedPipeline(network("adm"), DDIMScheduler()))
    expected = draw(pipe)
    pipe.classifier, pipe.unet = (torch.compile(x, backend="eager") for x in (classifier(), pipe.unet))
    assert_same(draw(pipe), expected)
    pipe.save_pretrained(tmp_path)
    loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path, use_safetensors=True))
    assert type(loaded.unet) is ADMUNet2DModel and type(loaded.classifier) is ADMClassifierModel
    assert_same(draw(loaded), expected)


# `from_pipe` and `AutoPipeline`


def test_from_pipe_both_ways(name, caplog, tmp_path):
    pipe, judge = ours(network(name, **CLASSES), id2label=LABELS, null_class_label=2), classifier()
    guided = quiet(ClassifierGuidedPipeline.from_pipe(pipe, classifier=judge))
    assert guided.unet is (pipe.unet or pipe.transformer) and guided.classifier is judge
    assert guided.scheduler is pipe.scheduler and guided.config.id2label == LABELS
    unguided = draw(pipe, class_labels="seven", guidance_scale=1.0)
    assert_same(draw(guided, class_labels="seven", guidance_scale=0.0), unguided)
    assert not np.allclose(draw(guided, class_labels="seven"), unguided, atol=1e-3)

    again = quiet(ClassConditionalPipeline.from_pipe(guided))
    assert again.unet is guided.unet and again.config.null_class_label == 2
    assert_same(draw(again, class_labels="seven"), draw(pipe, class_labels="seven"))
    assert "not switched over" not in caplog.text
    again.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "ClassConditionalPipeline" and not {"classifier", "_classifier"} & set(index)
    loaded = quiet(DiffusionPipeline.from_pretrained(tmp_path, use_safetensors=True))
    assert_same(draw(loaded, class_labels="seven"), draw(again, class_labels="seven"))


def test_from_pipe_takes_what_it_is_given():
    schedule = {"beta_schedule": "squaredcos_cap_v2"}
    pipe = ClassifierGuidedPipeline(network("adm"), DDIMScheduler(), classifier(), classifier_schedule=schedule)
    scheduler, unet = DDPMScheduler(), network("ddpm", **CLASSES)
    other = ClassConditionalPipeline.from_pipe(pipe, scheduler=scheduler, unet=unet, id2label=LABELS)
    assert other.scheduler is scheduler and other.unet is unet and other.labels["seven"] == 3
    back = ClassifierGuidedPipeline.from_pipe(other, classifier=None)
    assert back.classifier is None and back.config.classifier_schedule == schedule
    with pytest.raises(TypeError, match="classifer"):
        ClassifierGuidedPipeline.from_pipe(other, classifer=classifier())


def test_from_pipe_leaves_the_precision_alone():
    pipe = ours(network("adm", **CLASSES)).to(torch.bfloat16)
    guided = ClassifierGuidedPipeline.from_pipe(pipe, classifier=classifier())
    assert pipe.unet.dtype == guided.unet.dtype == torch.bfloat16 and guided.classifier.dtype == torch.float32
    guided = ClassifierGuidedPipeline.from_pipe(pipe, classifier=classifier(), dtype=torch.float16)
    assert guided.unet.dtype == guided.classifier.dtype == torch.float16


def test_from_pipe_does_not_lose_a_decoder():
    pipe = ours(network("adm", **CLASSES), vae=decoder(latent_channels=3))
    with pytest.raises(ValueError, match="has a `vae`, .* ClassifierGuidedPipeline decodes none"):
        ClassifierGuidedPipeline.from_pipe(pipe, classifier=classifier())
    assert ClassConditionalPipeline.from_pipe(pipe).vae is pipe.vae


def test_from_pipe_names_what_it_leaves_out(caplog):
    """Guidance that a class has no place for is not to vanish without a word."""
    judge, weaker = classifier(), network("dilated", num_class_embeds=4)
    pipe = ours(network("adm", **CLASSES), guide_model=weaker, guider=ClassifierFreeGuidance(guidance_scale=2.0))
    caplog.clear()
    guided = ClassifierGuidedPipeline.from_pipe(pipe, classifier=judge)
    assert guided.guider is pipe.guider and len(caplog.messages) == 1
    assert "ClassifierGuidedPipeline has no place for `guide_model` of `pipeline` Class" in caplog.messages[0]
    caplog.clear()
    back = ClassConditionalPipeline.from_pipe(guided, guide_model=weaker)
    assert back.guide_model is weaker and len(caplog.messages) == 1
    assert "ClassConditionalPipeline has no place for `classifier` of `pipeline` Class" in caplog.messages[0]
    assert "`from_pipe(..., classifier=pipeline.classifier)`" in caplog.messages[0]
    caplog.clear()
    transformer = ours(network("gqa-dit", **CLASSES))  # which becomes the `unet`
    ClassConditionalPipeline.from_pipe(ClassifierGuidedPipeline.from_pipe(transformer))
    assert caplog.messages == []


def test_from_pipe_of_diffusers():
    unet = network("adm")
    theirs = DDPMPipeline(unet, DDPMScheduler())
    for pipeline_class in (ClassConditionalPipeline, ClassifierGuidedPipeline):
        pipe = pipeline_class.from_pipe(theirs)
        assert pipe.unet is unet and pipe.scheduler is theirs.scheduler
        assert DDPMPipeline.from_pipe(pipe, unet=pipe.unet).unet is unet  # their annotation names UNet2DModel alone


def test_auto_pipeline(tmp_path):
    pipe = ours(network("composable", cross_attention_dim=12))
    pipe.save_pretrained(tmp_path)
    assert type(AutoPipelineForText2Image.from_pipe(pipe)) is ClassConditionalPipeline
    loaded = quiet(AutoPipelineForText2Image.from_pretrained(tmp_path, use_safetensors=True))
    assert type(loaded) is ClassConditionalPipeline
    texts = {"prompt_embeds": torch.ones(1, 6, 12)}
    assert_same(draw(loaded, **texts), draw(pipe, **texts))


# LoRA


def train_adapter(model, adapter_name, targets):
    """Two steps of what a user's loop does: only the new adapter learns."""
    model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets), adapter_name)
    model.set_adapters(adapter_name)
    parameters = [x for key, x in model.named_parameters() if f".{adapter_name}." in key]
    optimizer = torch.optim.AdamW(parameters, lr=0.05)
    torch.manual_seed(len(adapter_name))
    for _ in range(2):
        sample, noise = torch.randn(2, 2, 3, 8, 8)
        prediction = model(sample, torch.tensor([10.0, 500.0]), torch.tensor([1, 2])).sample
        nn.functional.mse_loss(prediction, noise).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_adapters_are_trained_pushed_loaded_and_fused(name, hub, hub_token, tmp_path):
    targets = ["conv_in", "conv"] if name == "dilated" else ["to_q", "to_k", "to_v", "to_out.0"]
    call = {"class_labels": [3, 1]}
    model = network(name, **CLASSES)
    pipe = ours(model)
    plain, expected = draw(pipe, **call), {}
    for style in ("ink", "chalk"):
        train_adapter(model, style, targets)
        expected[style] = draw(pipe, **call)
        assert np.abs(expected[style] - plain).max() > 0.01
        model.save_lora_adapter(tmp_path / style, adapter_name=style)
        push(tmp_path / style, f"me/{name}-{style}", private=True)
        assert "pytorch_lora_weights.safetensors" in hub.files(f"me/{name}-{style}")
    assert not np.allclose(expected["ink"], expected["chalk"], atol=1e-3)

    pipe = ours(network(name, **CLASSES))
    model = pipe.unet or pipe.transformer
    for style in expected:
        repo_id = f"me/{name}-{style}"
        with pytest.raises(OSError):
            model.load_lora_adapter(repo_id, adapter_name=style, local_files_only=True)
        model.load_lora_adapter(repo_id, adapter_name=style, token=hub_token)
        model.delete_adapters(style)
        model.load_lora_adapter(repo_id, adapter_name=style, local_files_only=True)
        model.set_adapters(style)
        assert_same(draw(pipe, **call), expected[style])
    model.set_adapters("ink")
    assert_same(draw(pipe, **call), expected["ink"])
    model.set_adapters(["ink", "chalk"], weights=[0.7, 0.3])
    mixed = draw(pipe, **call)
    model.fuse_lora()
    assert_same(draw(pipe, **call), mixed, atol=1e-4)
    model.unfuse_lora()
    assert_same(draw(pipe, **call), mixed, atol=1e-4)
    model.disable_lora()
    assert_same(draw(pipe, **call), plain, atol=1e-4)
    model.enable_lora()
    model.delete_adapters("chalk")
    model.set_adapters("ink")
    assert_same(draw(pipe, **call), expected["ink"], atol=1e-4)

    # What is fused becomes an ordinary model.
    model.fuse_lora()
    model.unload_lora()
    pipe.save_pretrained(tmp_path / "fused")
    fused = quiet(DiffusionPipeline.from_pretrained(tmp_path / "fused", use_safetensors=True))
    assert_same(draw(fused, **call), expected["ink"], atol=1e-4)


def test_adapter_of_a_classifier(tmp_path):
    model = classifier()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    model.save_lora_adapter(tmp_path)
    sample = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    loaded = classifier()
    assert not torch.allclose(loaded(sample, 10).logits, model(sample, 10).logits, atol=1e-3)
    loaded.load_lora_adapter(tmp_path / "pytorch_lora_weights.safetensors")
    torch.testing.assert_close(loaded(sample, 10).logits, model(sample, 10).logits)


# Quantised weights


def int8_weights():
    if not is_torchao_available() or not is_torchao_version(">=", "0.16.0"):
        pytest.skip("needs torchao 0.16, with which diffusers writes quantised weights as safetensors")
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig(version=2))


def num_quantised(model):
    """Number of weights that torchao keeps."""
    from torchao.utils import TorchAOBaseTensor

    return sum(isinstance(x, TorchAOBaseTensor) for x in model.parameters())


def predict(model):
    sample = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(sample.to(model.dtype), torch.tensor([500.0, 20.0]), torch.tensor([1, 2])).sample.float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantised_loading(name, dtype, tmp_path):
    quantised = {"quantization_config": int8_weights(), "torch_dtype": dtype, "use_safetensors": True}
    model = network(name, **CLASSES)
    model.save_pretrained(tmp_path / "float")
    loaded = AutoModel.from_pretrained(str(tmp_path / "float"), **quantised)
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert type(loaded) is type(model) and loaded.dtype == dtype and num_quantised(loaded) == len(linear) > 0
    expected, actual = predict(model), predict(loaded)
    assert 0 < (actual - expected).norm() / expected.norm() < (0.05 if dtype == torch.bfloat16 else 0.03)

    loaded.save_pretrained(tmp_path / "int8")
    assert [path.suffix for path in sorted((tmp_path / "int8").iterdir())] == [".json", ".safetensors"]
    again = AutoModel.from_pretrained(str(tmp_path / "int8"), torch_dtype=dtype, use_safetensors=True)
    assert num_quantised(again) == len(linear)
    assert torch.equal(predict(again), actual)


def test_quantised_pipeline(hub, hub_token, tmp_path):
    weights = int8_weights()
    pipe = ours(network("gqa-dit", **CLASSES))
    expected = draw(pipe, class_labels=[3])
    pipe.save_pretrained(tmp_path)
    config = PipelineQuantizationConfig(quant_mapping={"transformer": weights})
    quantised = {"quantization_config": config, "dtype": torch.bfloat16, "use_safetensors": True}
    small = quiet(DiffusionPipeline.from_pretrained(tmp_path, **quantised))
    assert num_quantised(small.transformer) > 0
    images = draw(small, class_labels=[3])
    assert 0 < np.abs(images - expected).mean() < 0.02

    push(small, "me/int8")
    loaded = quiet(DiffusionPipeline.from_pretrained("me/int8", dtype=torch.bfloat16, use_safetensors=True))
    assert num_quantised(loaded.transformer) == num_quantised(small.transformer)
    np.testing.assert_array_equal(draw(loaded, class_labels=[3]), images)
    guided = quiet(ClassifierGuidedPipeline.from_pipe(loaded, classifier=classifier()))
    assert guided.unet is loaded.transformer and num_quantised(guided.unet) > 0
    assert not np.allclose(draw(guided, class_labels=[3]), images, atol=1e-3)
