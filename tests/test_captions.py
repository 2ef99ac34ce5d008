"""Captions: every kind of text encoder, masks; ClassConditionalPipeline with prompts."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BartConfig,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    GPT2Config,
    GPT2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

import diffusers
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel

from diffusers_ext import ADMUNet2DModel, ComposableUNet2DModel
from diffusers_ext.pipelines import ClassConditionalPipeline
from diffusers_ext.training.captions import CaptionEncoder


WORDS = ["<pad>", "<unk>", "a", "one", "two", "three", "round", "thin", "digit", "blurred"]
WIDE = 16
TEXT = {"vocab_size": len(WORDS), "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": WIDE}
CLIP_TEXT = {**TEXT, "intermediate_size": 32, "max_position_embeddings": 12, "bos_token_id": 2, "eos_token_id": 3}
T5 = {"vocab_size": len(WORDS), "d_model": WIDE, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
ENCODERS = {
    "clip": lambda: CLIPTextModel(CLIPTextConfig(**CLIP_TEXT)),
    "t5": lambda: T5EncoderModel(T5Config(**T5)),
    "bert": lambda: BertModel(BertConfig(**TEXT, intermediate_size=32, max_position_embeddings=12)),
    "gpt2": lambda: GPT2Model(GPT2Config(vocab_size=len(WORDS), n_embd=WIDE, n_layer=1, n_head=2, n_positions=12)),
}
CHECKPOINTS = {  # saved class, and what is to be loaded of it
    "clip": (
        lambda: CLIPModel(
            CLIPConfig(
                text_config=CLIP_TEXT,
                vision_config={**CLIP_TEXT, "image_size": 8, "patch_size": 4},
                projection_dim=8,
            )
        ),
        CLIPTextModel,
    ),
    "clip-text": (ENCODERS["clip"], CLIPTextModel),
    "t5": (lambda: T5ForConditionalGeneration(T5Config(**T5)), T5EncoderModel),
    "bert": (ENCODERS["bert"], BertModel),
}
UNET = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_resolutions": (8, 4),
    "attention_head_dim": 16,
    "cross_attention_dim": WIDE,
}
LABELLED = {"num_class_embeds": 4, "null_class": True}


@pytest.fixture
def diffusers_log():
    """What diffusers and we log reaches `caplog`."""
    diffusers.utils.logging.enable_propagation()
    yield
    diffusers.utils.logging.disable_propagation()


def tiny_tokenizer(pad=True):
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", **({"pad_token": "<pad>"} if pad else {})}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def tiny_encoder(kind="clip"):
    torch.manual_seed(0)
    model = ENCODERS[kind]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def tiny_network(model_class=ComposableUNet2DModel, **config):
    torch.manual_seed(0)
    model = model_class(**{**UNET, **config} if model_class is ComposableUNet2DModel else config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def tiny_pipe(kind="clip", network=None, **components):
    captions = CaptionEncoder(tiny_tokenizer(), tiny_encoder(kind))
    components = {**captions.components(), **components}
    components.setdefault("scheduler", DDIMScheduler(clip_sample=False))
    pipe = ClassConditionalPipeline(network or tiny_network(), **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, **arguments):
    arguments = {"num_inference_steps": 2, "output_type": "latent", **arguments}
    arguments.setdefault("generator", torch.Generator().manual_seed(0))
    return pipe(**arguments).images


# Encoding


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("kind", ENCODERS)
def test_captions_have_one_length_and_do_not_see_padding(kind, pad):
    encoder = tiny_encoder(kind)
    captions = CaptionEncoder(tiny_tokenizer(pad), encoder)
    states, mask = captions.encode(["a round digit", "two", ""])
    length = 77 if kind == "t5" else 12
    assert captions.max_length == length and captions.dim == WIDE
    assert states.shape == (3, length, WIDE) and mask.sum(dim=1).tolist() == [3, 1, 0]
    assert states[1, 0].any() and not states[mask == 0].any() and not states.requires_grad
    with torch.no_grad():
        alone = encoder(input_ids=torch.tensor([[2, 6, 8]])).last_hidden_state
    torch.testing.assert_close(states[:1, :3], alone, rtol=1e-4, atol=1e-5)
    assert not encoder.training and not any(parameter.requires_grad for parameter in encoder.parameters())
    again = captions.encode([""])  # out of the cache
    torch.testing.assert_close(again[0], states[2:])
    assert captions.to(dtype=torch.bfloat16).encode([""])[0].dtype == torch.bfloat16


def test_network_does_not_see_padding():
    network, encoder = tiny_network(), tiny_encoder("bert")
    short, long = (CaptionEncoder(tiny_tokenizer(), encoder, max_length) for max_length in (4, 11))
    sample, outputs = torch.randn(2, 3, 8, 8), []
    for captions in (short, long):
        with torch.no_grad():
            outputs.append(network(sample, 5, **captions.conditions(["a digit", "three"])).sample)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_long_captions_are_cut():
    captions = CaptionEncoder(tiny_tokenizer(), tiny_encoder(), max_length=3)
    torch.testing.assert_close(captions.encode(["a round digit two"]), captions.encode(["a round digit"]))
    assert captions.encode(["a"])[0].shape == (1, 3, WIDE)


def test_empty_captions_among_others_are_encoded_as_by_themselves():
    encoder = CaptionEncoder(tiny_tokenizer(), tiny_encoder())
    states, mask = encoder.encode(["a round digit", "", "two", ""])
    torch.testing.assert_close(states[[1, 3]], encoder.encode(["", ""])[0])
    torch.testing.assert_close(states[[0, 2]], encoder.encode(["a round digit", "two"])[0])
    assert mask.sum(dim=1).tolist()[0] == 3


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_from_pretrained(kind, tmp_path):
    build, expected = CHECKPOINTS[kind]
    torch.manual_seed(0)
    model = build()
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    captions = CaptionEncoder.from_pretrained(str(tmp_path))
    assert type(captions.text_encoder) is expected and captions.text_encoder.dtype == torch.float32
    weights = model.state_dict()
    for name, value in captions.text_encoder.state_dict().items():
        saved = next(weights[key] for key in (name, f"text_model.{name}") if key in weights)
        assert torch.equal(value, saved), name
    assert captions.encode(["a digit"])[0].isfinite().all()


def test_from_pretrained_of_a_pipeline(tmp_path):
    pipe = tiny_pipe("t5")
    pipe.save_pretrained(tmp_path)
    captions = CaptionEncoder.from_pretrained(str(tmp_path))
    assert captions.max_length == 77
    for ours, theirs in zip(captions.encode(["a digit"]), pipe.encode_prompt("a digit"), strict=True):
        assert torch.equal(ours, theirs)


def test_errors_of_captions(tmp_path):
    captions = CaptionEncoder(tiny_tokenizer(), tiny_encoder())
    captions.check_network(ComposableUNet2DModel, UNET)
    with pytest.raises(ValueError, match="ADMUNet2DModel takes no `encoder_hidden_states`.*composable"):
        captions.check_network(ADMUNet2DModel, {})
    with pytest.raises(ValueError, match="this ComposableUNet2DModel takes no .*attention_dim=16"):
        captions.check_network(ComposableUNet2DModel, {})
    with pytest.raises(ValueError, match="16 wide, but ComposableUNet2DModel has `cross_attention_dim` 24"):
        captions.check_network(ComposableUNet2DModel, {"cross_attention_dim": 24})
    with pytest.raises(ValueError, match="`captions` is or holds None"):
        captions.encode(["a", None])
    with pytest.raises(ValueError, match="`captions` is or holds 'two'"):
        captions.encode("two")
    with pytest.raises(ValueError, match="`max_length` is 13; CLIPTextModel and its tokenizer take 1 to 12"):
        CaptionEncoder(tiny_tokenizer(), tiny_encoder(), max_length=13)
    BartConfig().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="did not load: it is a .bart., of which"):
        CaptionEncoder.from_pretrained(str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="`text_encoder` .* did not load"):
        CaptionEncoder.from_pretrained(str(tmp_path))


# The pipeline


@pytest.mark.parametrize("kind", ENCODERS)
def test_prompts_change_the_images(kind):
    pipe = tiny_pipe(kind)
    one, other = draw(pipe, prompt="a round digit"), draw(pipe, prompt="two")
    assert one.shape == (1, 3, 8, 8) and not torch.allclose(one, other, atol=1e-3)
    assert torch.equal(one, draw(pipe, prompt="a round digit", guidance_scale=4.0))
    assert torch.equal(draw(pipe), draw(pipe, prompt="", guidance_scale=1.0))
    together = draw(pipe, prompt=["a round digit", "two"], generator=[torch.Generator().manual_seed(0) for _ in "ab"])
    torch.testing.assert_close(together, torch.cat([one, other]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("labelled", [False, True])
def test_guidance_is_the_formula(labelled):
    network = tiny_network(**LABELLED) if labelled else tiny_network()
    pipe, noise = tiny_pipe(network=network), torch.randn(1, 3, 8, 8)
    label = {"class_labels": 2} if labelled else {}

    def after_a_step(**arguments):  # which is linear in what the network predicts
        return draw(pipe, sample=noise, num_inference_steps=1, **arguments)

    conditional = after_a_step(prompt="two", guidance_scale=1.0, **label)
    for negative in ("", "blurred digit"):
        worse = after_a_step(prompt=negative, guidance_scale=1.0)
        expected = worse + 3 * (conditional - worse)
        words = {"prompt": "two", **label, **({"negative_prompt": negative} if negative else {})}
        torch.testing.assert_close(after_a_step(**words, guidance_scale=3.0), expected, rtol=1e-4, atol=1e-4)
        pipe.guider = diffusers.ClassifierFreeGuidance(guidance_scale=3.0)
        torch.testing.assert_close(after_a_step(**words), expected, rtol=1e-4, atol=1e-4)
        pipe.guider = None


def test_autoguidance_sees_the_same_prompt():
    network, guide_model = tiny_network(), tiny_network(block_out_channels=(16, 16))
    alone, pipe = tiny_pipe(network=guide_model), tiny_pipe(network=network, guide_model=guide_model)
    step = {"prompt": "two", "num_inference_steps": 1}
    worse, conditional = draw(alone, **step, guidance_scale=1.0), draw(pipe, **step, guidance_scale=1.0)
    torch.testing.assert_close(draw(pipe, **step), worse + 2 * (conditional - worse), rtol=1e-4, atol=1e-4)


def test_labels_without_a_null_class_are_guided_by_the_text():
    pipe = tiny_pipe(network=tiny_network(num_class_embeds=4))
    assert not torch.equal(
        draw(pipe, prompt="two", class_labels=1), draw(pipe, prompt="two", class_labels=1, guidance_scale=1.0)
    )


def test_embeddings_in_place_of_prompts():
    pipe = tiny_pipe("bert")
    embeds, mask = pipe.encode_prompt(["a round digit", "two"])
    expected = draw(pipe, prompt=["a round digit", "two"])
    assert torch.equal(draw(pipe, prompt_embeds=embeds, prompt_attention_mask=mask), expected)
    short = draw(pipe, prompt_embeds=embeds[:, :3], prompt_attention_mask=mask[:, :3])
    torch.testing.assert_close(short, expected, rtol=1e-3, atol=1e-3)
    negative = dict(zip(("negative_prompt_embeds", "negative_prompt_attention_mask"), pipe.encode_prompt("")))
    pipe.text_encoder = None
    alone = draw(pipe, prompt_embeds=embeds, prompt_attention_mask=mask, **negative)
    assert torch.equal(alone, expected)
    unguided = {"prompt_embeds": embeds, "prompt_attention_mask": mask}
    assert torch.equal(draw(pipe, **unguided), draw(pipe, **unguided, guidance_scale=1.0))
    assert draw(pipe).shape == (1, 3, 8, 8)  # without text encoder, of no text at all


def test_number_of_images():
    pipe = tiny_pipe(network=tiny_network(**LABELLED))
    texts = {"prompt": ["a", "two"], "num_images_per_prompt": 2}
    noise = torch.randn(4, 3, 8, 8)
    images = draw(pipe, **texts, class_labels=[1, 3], sample=noise)
    same = draw(pipe, prompt=["a", "a", "two", "two"], class_labels=[1, 1, 3, 3], sample=noise)
    torch.testing.assert_close(images, same)
    assert draw(pipe, prompt="two", batch_size=3).shape[0] == draw(pipe, prompt="two", class_labels=[1, 2, 3]).shape[0]
    assert draw(pipe, class_labels=[1, 2], num_images_per_prompt=2).shape[0] == 4
    assert draw(pipe, num_images_per_prompt=3).shape[0] == 3


@pytest.mark.parametrize("kind", ENCODERS)
def test_saved_and_loaded_with_text_encoder(kind, tmp_path, caplog, diffusers_log):
    pipe = tiny_pipe(kind)
    pipe.save_pretrained(tmp_path)
    with caplog.at_level("WARNING"):
        loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert "xpected types" not in caplog.text
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is ClassConditionalPipeline and type(loaded.text_encoder) is type(pipe.text_encoder)
    words = {"prompt": ["a round digit", "two"], "negative_prompt": "blurred"}
    assert torch.equal(draw(loaded, **words), draw(pipe, **words))
    again = ClassConditionalPipeline.from_pipe(loaded)
    assert again.text_encoder is loaded.text_encoder and again.tokenizer is loaded.tokenizer
    again.enable_model_cpu_offload(device="cpu")
    assert torch.equal(draw(again, **words), draw(pipe, **words))


def test_unet_of_diffusers():
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    config = {"sample_size": 8, "in_channels": 3, "out_channels": 3, "block_out_channels": (16,), "norm_num_groups": 8}
    heads = {"cross_attention_dim": WIDE, "attention_head_dim": 2, "layers_per_block": 1}
    pipe = tiny_pipe(network=tiny_network(UNet2DConditionModel, **config, **blocks, **heads))
    assert not torch.allclose(draw(pipe, prompt="two"), draw(pipe, prompt="a"), atol=1e-3)
    pipe.text_encoder = None
    with pytest.raises(ValueError, match="`prompt_embeds` is None, but `unet` UNet2DConditionModel has to be told"):
        draw(pipe)


def test_long_prompts_are_cut_with_a_warning(caplog, diffusers_log):
    pipe = tiny_pipe()
    with caplog.at_level("WARNING"):
        long = draw(pipe, prompt=" ".join(["two"] * 15))
    assert "has 15 tokens; the text encoder sees the first 12" in caplog.text
    assert torch.equal(long, draw(pipe, prompt=" ".join(["two"] * 12)))


EMBEDS = torch.zeros(1, 2, WIDE)
ERRORS = [
    ({"prompt": 3}, "`prompt` is 3; it must be a text"),
    ({"prompt": []}, r"`prompt` is \[\]; it must be a text"),
    ({"prompt": ["a", None]}, "it must be a text"),
    ({"prompt": "a", "prompt_embeds": EMBEDS}, "`prompt` and `prompt_embeds` are both given"),
    ({"prompt_embeds": EMBEDS[0]}, r"`prompt_embeds` has shape \(2, 16\)"),
    ({"prompt_embeds": EMBEDS[..., :5]}, "`prompt_embeds` is 5 wide, but `unet` attends to 16"),
    ({"prompt_embeds": EMBEDS, "prompt_attention_mask": torch.ones(1, 3)}, r"shape \(1, 3\); it must be .*\(1, 2\)"),
    ({"prompt": "a", "prompt_attention_mask": torch.ones(1, 3)}, "was given without `prompt_embeds`"),
    ({"negative_prompt_embeds": EMBEDS}, "`negative_prompt_embeds` were given alone"),
    ({"prompt": ["a", "two"], "batch_size": 3}, "`prompt` has 2 texts, but there are 3"),
    ({"prompt": ["a", "two"], "negative_prompt": ["a"] * 3}, "`prompt` has 2 texts, but there are 3"),
    ({"prompt": ["a", "two"], "class_labels": [1, 2, 3]}, "`prompt` has 2 texts, but there are 3"),
    ({"prompt": ["a"] * 3, "class_labels": [1, 2]}, "`class_labels` has 2 labels for 3 images"),
    ({"prompt": "a", "num_images_per_prompt": 0}, "`num_images_per_prompt` is 0"),
    ({"prompt": "a", "num_images_per_prompt": 2, "batch_size": 2}, "give one of them"),
    ({"prompt": "a", "text_encoder": None}, "`prompt` was given, but the pipeline has no `text_encoder`"),
    ({"prompt": "a", "tokenizer": None}, "`prompt` was given, but the pipeline has no `tokenizer`"),
    ({"prompt_embeds": EMBEDS, "text_encoder": None, "guidance_scale": 2.0}, "`negative_prompt_embeds` is None, for"),
    ({"prompt": "a", "cross_attention_dim": None}, "`prompt` was given, but `unet` attends to no text"),
    ({"prompt": "a", "cross_attention_dim": 24}, "16 wide tokens, but `unet` attends to 24"),
]


@pytest.mark.parametrize("arguments, message", ERRORS, ids=range(len(ERRORS)))
def test_errors_of_prompts(arguments, message):
    config = {name: arguments[name] for name in ("cross_attention_dim",) if name in arguments}
    components = {name: arguments[name] for name in ("text_encoder", "tokenizer") if name in arguments}
    rest = {name: value for name, value in arguments.items() if name not in config and name not in components}
    pipe = tiny_pipe(network=tiny_network(**LABELLED, **config), **components)
    with pytest.raises(ValueError, match=message):
        draw(pipe, **rest)
