"""Options of a training run: one frozen dataclass per task; presets are instances of it."""

import json
import re
from dataclasses import dataclass
from typing import Any, Literal


LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")
# Options, what their values must be, and whether a value is that.
RANGES = (
    (
        ("max_train_steps", "num_train_epochs", "train_batch_size", "gradient_accumulation_steps", "log_steps")
        + ("checkpointing_steps", "validation_steps", "validation_epochs", "validation_images", "bucket_step")
        + ("validation_inference_steps", "shuffle_buffer_size", "sample_size", "resolutions"),
        "at least 1",
        lambda value: value >= 1,
    ),
    (
        ("seed", "checkpoints_total_limit", "dataloader_num_workers", "lr_warmup_steps", "adam_weight_decay"),
        "at least 0",
        lambda value: value >= 0,
    ),
    (("learning_rate", "max_grad_norm", "adam_epsilon"), "more than 0", lambda value: value > 0),
    (("ema_decay", "adam_beta1", "adam_beta2"), "at least 0 and less than 1", lambda value: 0 <= value < 1),
    (("caption_dropout_prob",), "between 0 and 1", lambda value: 0 <= value <= 1),
    (("max_aspect_ratio",), "at least 1", lambda value: value >= 1),
    (("license",), "an identifier of a licence as the Hub has them, such as apache-2.0", LICENCE.fullmatch),
)


@dataclass(frozen=True)
class TrainingConfig:
    """Options shared by every task."""

    output_dir: str = "runs/digits"
    """run folder: checkpoints, metrics.jsonl, samples and, at the end, the trained pipeline or component"""
    preset: Literal["digits", "mnist"] = "digits"
    """where the defaults of all other options come from"""
    config: str | None = None
    """YAML or JSON file of options under these names, such as the config.json of a run folder; it changes the preset,
    and options typed change it"""
    dry_run: bool = False
    """print the resolved options, the number of parameters, the memory that a step needs and the steps, and stop"""

    dataset: str = "digits"
    """`digits` (8x8, inside scikit-learn), a local folder or file (parquet, images in class folders, `save_to_disk`)
    or a Hub name"""
    dataset_config_name: str | None = None
    """configuration of a dataset that has several"""
    dataset_split: str = "train"
    """split to train on"""
    image_column: str | None = None
    """None: the only column of type Image"""
    label_column: str | None = None
    """None: the only column of type ClassLabel"""
    streaming: bool = False
    """read the dataset as it comes, without a copy on disk; shuffled within a buffer"""
    shuffle_buffer_size: int = 10_000
    """rows of that buffer"""
    dataloader_num_workers: int = 0
    """processes that decode images; useful only for data too large to be kept decoded in memory"""
    random_flip: bool = False
    """mirror every other image, by chance"""
    resize_mode: Literal["fit", "center_crop", "random_crop"] = "fit"
    """fit: small images are enlarged by whole factors and padded with black, larger ones resized and cropped;
    center_crop and random_crop: as guided-diffusion, box halving, then bicubic, then a crop"""
    mixed_modes: Literal["error", "convert"] = "error"
    """what to do when greyscale and colour images are mixed: name the row, or convert all to `in_channels`"""

    seed: int = 0
    """of initial weights, data order, noise and timesteps"""
    max_train_steps: int = 2000
    """optimizer steps"""
    num_train_epochs: int | None = None
    """passes through the data, in place of `max_train_steps`"""
    train_batch_size: int = 64
    """images per device and forward pass"""
    gradient_accumulation_steps: int = 1
    """forward passes per optimizer step"""
    learning_rate: float = 1e-3
    """after warm-up"""
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "cosine"
    """shape of the learning rate over the optimizer steps"""
    lr_warmup_steps: int = 100
    """optimizer steps; ignored by `constant`"""
    adam_beta1: float = 0.9
    """decay of the first moment"""
    adam_beta2: float = 0.99
    """decay of the second moment"""
    adam_weight_decay: float = 0.0
    """decoupled, per unit of learning rate"""
    adam_epsilon: float = 1e-8
    """added to the root of the second moment"""
    use_8bit_adam: bool = False
    """AdamW with moments in 8 bits, by bitsandbytes: `pip install "diffusers_ext[8bit]"`"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this Euclidean norm"""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """when a loss or gradient is NaN or infinite: stop with the rows of the batch, or leave the step out and count"""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """of the network's arithmetic; weights, optimizer and EMA stay float32"""
    allow_tf32: bool = False
    """faster float32 matrix products on NVIDIA GPUs since Ampere, of 10 instead of 23 bits"""
    gradient_checkpointing: bool = False
    """compute activations twice instead of keeping them"""
    channels_last: bool = False
    """memory format of the weights, which activations follow"""
    use_ema: bool = True
    """validate and save an exponential moving average of the weights"""
    ema_decay: tuple[float, ...] = (0.9999,)
    """largest decay per optimizer step; of several, the first is validated and saved, the others saved as variants"""
    ema_power: float = 0.75
    """warm-up: decay at step n is min(ema_decay, 1 - (1 + n) ** -ema_power)"""
    posthoc_ema_sigma_rels: tuple[float, ...] = ()
    """relative widths of averages made after the training (Karras et al., 2024, Sec. 3.2), saved as variants; by
    ema-pytorch: `pip install "diffusers_ext[posthoc-ema]"`. The run folder keeps 64 copies of the weights for it"""

    checkpointing_steps: int = 500
    """optimizer steps between checkpoints"""
    checkpoints_total_limit: int = 2
    """older checkpoints are deleted; 0 keeps all"""
    resume_from_checkpoint: str | None = None
    """`latest` (starts anew when there is none) or a checkpoint folder that you trust: it holds pickles"""
    validation_steps: int = 500
    """optimizer steps between validations"""
    validation_epochs: int | None = None
    """passes through the data between validations, in place of `validation_steps`"""
    log_steps: int = 50
    """optimizer steps averaged in one line of metrics.jsonl"""
    report_to: Literal["none", "tensorboard", "trackio", "wandb", "all"] = "none"
    """tracker beside metrics.jsonl; all: those that are installed"""
    push_to_hub: bool = False
    """upload the finished run: pipeline or component, card and samples"""
    hub_model_id: str | None = None
    """repository to upload to; None: your name and that of the run folder"""
    hub_private_repo: bool = False
    """whether a repository that the upload creates is private"""
    license: str | None = None
    """of the trained weights, as the Hub names it, such as apache-2.0; None: not chosen, which the card says"""

    num_train_timesteps: int = 1000
    """steps T of the forward process"""
    beta_schedule: Literal["linear", "squaredcos_cap_v2", "sigmoid", "scaled_linear"] = "linear"
    """noise schedule, as DDPMScheduler names it; squaredcos_cap_v2 is the cosine schedule"""
    beta_start: float | None = None
    """None: 0.0001, and 0.00085 for scaled_linear"""
    beta_end: float | None = None
    """None: 0.02, and 0.012 for scaled_linear"""
    rescale_betas_zero_snr: bool = False
    """no signal is left at the last timestep (Lin et al., 2023); not for a network that predicts the noise"""

    model: str = "adm/digits"
    """named size of a network, family/name, see `diffusers_ext.models.PRESETS`; the options below change it"""
    pretrained_model_name_or_path: str | None = None
    """start from these weights: folder or Hub name of a pipeline or network of ours, in place of `model`"""
    sample_size: int | None = None
    """pixels; how images are brought to it is decided by `resize_mode`"""
    in_channels: int | None = None
    """1 greyscale, 3 colour"""
    block_out_channels: tuple[int, ...] | None = None
    """width of each resolution, highest first"""
    layers_per_block: int | None = None
    """resnets per resolution"""
    attention_resolutions: tuple[int, ...] | None = None
    """feature map sizes in pixels"""
    attention_head_dim: int | None = None
    """channels per head"""
    norm_num_groups: int | None = None
    """groups of every GroupNorm"""
    resample_type: str | None = None
    """how resolutions are connected"""
    resnet_time_scale_shift: str | None = None
    """how the timestep enters: scale and shift after the second norm, or added before it"""
    dropout: float | None = None
    """inside every block"""
    model_options: tuple[str, ...] = ()
    """any other option of the network, as `name=value` with the value in JSON: `num_key_value_heads=2`"""

    def __post_init__(self) -> None:
        for names, rule, holds in RANGES:
            for name in names:
                value = getattr(self, name, None)
                if value is not None and not all(map(holds, value if isinstance(value, tuple) else (value,))):
                    raise ValueError(f"`{name}` ({value}) must be {rule}.")


@dataclass(frozen=True)
class UNetTrainingConfig(TrainingConfig):
    """Train a backbone that removes noise and, with learned variance, says how certain each step is."""

    preset: Literal["digits", "mnist", "film-mnist", "dit-gqa-mnist", "ddpm-mnist", "dilated-mnist"] = "digits"
    """where the defaults of all other options come from"""
    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow_prediction"] = "epsilon"
    """what the network predicts: the noise, v of Salimans and Ho (2022), the clean image, or the velocity of a
    rectified flow (Liu et al., 2023)"""
    learned_variance: bool = True
    """twice the output channels; the variance is trained by the variational bound. `--no_learned_variance` leaves it
    fixed, as flows need it"""
    loss_type: Literal["mse", "l1", "huber", "hybrid", "vlb"] | None = None
    """hybrid: squared error, and the bound for the variance (Nichol and Dhariwal, 2021); vlb: the whole bound; None:
    hybrid with learned variance, else mse. With learned variance the others get the bound for the variance as well"""
    loss_reduction: Literal["mean", "sum"] = "mean"
    """over the pixels of an image; sum is that of Ho et al. (2020) as published by DDIM"""
    huber_c: float = 0.1
    """where the pseudo-Huber loss turns from squared to absolute"""
    loss_weighting: Literal["uniform", "min_snr", "p2", "snr"] = "uniform"
    """by timestep: min-SNR of Hang et al. (2023), P2 of Choi et al. (2022), or the signal-to-noise ratio itself"""
    snr_gamma: float = 5.0
    """of min_snr: the largest weight"""
    p2_gamma: float = 1.0
    """of p2: exponent"""
    p2_k: float = 1.0
    """of p2: added to the signal-to-noise ratio"""
    timestep_sampling: Literal["uniform", "gaussian", "logit_normal", "loss_second_moment", "antithetic"] = "uniform"
    """distribution of the timesteps that are trained: gaussian is centred on the middle, logit_normal as Esser et al.
    (2024), loss_second_moment as Nichol and Dhariwal (2021), antithetic in pairs t and T - 1 - t"""
    timestep_std: float = 0.25
    """of gaussian: standard deviation as a share of the sequence"""
    logit_mean: float = 0.0
    """of logit_normal: more than 0 favours noisy images"""
    logit_std: float = 1.0
    """of logit_normal"""
    flow_shift: float = 1.0
    """of flow_prediction: more than 1 moves timesteps towards the noise, as large images need"""
    perceptual_model: str | None = None
    """adds the distance between features of the predicted and the real clean image: folder or Hub name of one of our
    classifiers or of a vision model of transformers"""
    perceptual_weight: float = 0.1
    """of that distance in the loss"""
    adversarial_model: str | None = None
    """adds the verdict of a discriminator on such features"""
    adversarial_weight: float = 0.01
    """of that verdict in the loss"""
    adversarial_learning_rate: float = 1e-4
    """of the discriminator"""

    class_conditional: bool = False
    """the network sees the labels"""
    class_dropout_prob: float = 0.0
    """share of labels replaced by a null class, for classifier-free guidance; 0: the network has no null class"""
    caption_column: str | None = None
    """column of texts that the network sees, through `text_encoder`; it needs `cross_attention_dim`"""
    text_encoder: str = "openai/clip-vit-base-patch32"
    """folder or Hub name of any text encoder of transformers; it is not trained"""
    caption_dropout_prob: float = 0.1
    """share of captions replaced by the empty one, for classifier-free guidance"""
    vae: str | None = None
    """folder or Hub name of an AutoencoderKL: train on its latents, made once; `sample_size` counts their pixels"""
    latents_cache_dir: str | None = None
    """where latents are kept; None: `latents/` in the run folder"""
    resolutions: tuple[int, ...] = ()
    """sizes in pixels to train on in turn, one per batch; empty: `sample_size` only"""
    aspect_ratio_bucketing: bool = False
    """keep the shape of images: batches of one size, with about as many pixels as a square"""
    bucket_step: int = 8
    """sides of such sizes are multiples of it"""
    max_aspect_ratio: float = 2.0
    """of the longest such size; images beyond it are cropped"""

    validation_images: int = 64
    """images of each sample grid"""
    validation_inference_steps: int = 25
    """steps of each sample grid, by DDIM, or Euler's method for a flow"""
    validation_guidance_scale: float | None = None
    """of each sample grid; None: the default of ClassConditionalPipeline"""
    validation_prompts: tuple[str, ...] = ()
    """captions of the sample grid, in turn; empty: captions of the data"""


@dataclass(frozen=True)
class ClassifierTrainingConfig(TrainingConfig):
    """Train a classifier of noisy images, for guidance."""

    model: str = "adm-classifier/digits"
    """named size of a classifier, family/name; the options below change it"""
    pool: Literal["attention", "adaptive", "spatial", "spatial_v2"] | None = None
    """from the last feature map to logits"""
    unet: str | None = None
    """folder or Hub name of the denoiser that the classifier is to guide: the run folder becomes a
    ClassifierGuidedPipeline of both"""
    validation_split: str = "test"
    """split whose accuracy is measured at eight noise levels"""
    validation_images: int = 1000
    """images of each validation"""


_MNIST = {"dataset": "ylecun/mnist", "mixed_precision": "bf16", "checkpointing_steps": 250}
# A class-conditional network with a null class, whose variance is fixed.
_LABELLED = {"learned_variance": False, "class_conditional": True, "class_dropout_prob": 0.1}


def _unet(name: str, **options) -> UNetTrainingConfig:
    return UNetTrainingConfig(preset=name, output_dir=f"runs/{name}", **options)


UNET_PRESETS = {
    "digits": UNetTrainingConfig(output_dir="runs/digits-unet"),
    "mnist": UNetTrainingConfig(
        preset="mnist", output_dir="runs/mnist-unet", model="adm/mnist-small", max_train_steps=4500, **_MNIST
    ),
    "film-mnist": _unet("film-mnist", model="composable/film-mnist", max_train_steps=3000, **_MNIST, **_LABELLED),
    "dit-gqa-mnist": _unet(
        "dit-gqa-mnist",
        model="dit/mnist",
        prediction_type="v_prediction",
        train_batch_size=32,
        max_train_steps=7500,
        **_MNIST,
        **_LABELLED,
    ),
    "ddpm-mnist": _unet("ddpm-mnist", model="ddpm/mnist-32", max_train_steps=3000, **_MNIST, **_LABELLED),
    "dilated-mnist": _unet(
        "dilated-mnist", model="dilated/mnist-small", max_train_steps=3000, learned_variance=False, **_MNIST
    ),
}

CLASSIFIER_PRESETS = {
    "digits": ClassifierTrainingConfig(output_dir="runs/digits-classifier", adam_weight_decay=0.05),
    "mnist": ClassifierTrainingConfig(
        preset="mnist",
        output_dir="runs/mnist-classifier",
        model="adm-classifier/mnist-small",
        max_train_steps=5000,
        adam_weight_decay=0.05,
        **_MNIST,
    ),
}


def named_values(option: str, pairs: tuple[str, ...]) -> dict[str, Any]:
    """`("a=1", "b=text")` -> `{"a": 1, "b": "text"}`."""
    values = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            raise ValueError(f"`{option}` holds {pair!r}; write name=value, with the value in JSON.")
        try:
            values[name] = json.loads(value)
        except json.JSONDecodeError:
            values[name] = value
    return values


def as_arguments(options: dict[str, Any]) -> list[str]:
    """Options as they would be typed."""
    arguments = []
    for name, value in options.items():
        if isinstance(value, bool):
            arguments.append(f"--{name}" if value else f"--no_{name}")
        else:
            arguments += [f"--{name}", *map(str, value if isinstance(value, list | tuple) else [value])]
    return arguments
