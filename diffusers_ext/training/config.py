"""Options of a training run: one frozen dataclass per task; presets are instances of it."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class TrainingConfig:
    """Options shared by every task."""

    output_dir: str = "runs/digits"
    """run folder: checkpoints, metrics.jsonl, samples and, at the end, the trained component"""
    preset: Literal["digits", "mnist"] = "digits"
    """where the defaults of all other options come from"""
    dry_run: bool = False
    """print the options and stop"""

    dataset: str = "digits"
    """`digits` (8x8, inside scikit-learn), a local folder (parquet, or images in class folders) or a Hub name"""
    dataset_split: str = "train"
    """split to train on"""
    image_column: str | None = None
    """None: the only column of type Image"""
    label_column: str | None = None
    """None: the only column of type ClassLabel"""
    dataloader_num_workers: int = 0
    """processes that decode images; useful only for data too large to be kept decoded in memory"""

    seed: int = 0
    """of initial weights, data order, noise and timesteps"""
    max_train_steps: int = 2000
    """optimizer steps"""
    train_batch_size: int = 64
    """images per device and forward pass"""
    gradient_accumulation_steps: int = 1
    """forward passes per optimizer step"""
    learning_rate: float = 1e-3
    """after warm-up"""
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "cosine"
    """shape of the learning rate over `max_train_steps`"""
    lr_warmup_steps: int = 100
    """optimizer steps; ignored by `constant`"""
    adam_beta1: float = 0.9
    """decay of the first moment"""
    adam_beta2: float = 0.99
    """decay of the second moment"""
    adam_weight_decay: float = 0.0
    """decoupled, per unit of learning rate"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this Euclidean norm"""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """of the network's arithmetic; weights, optimizer and EMA stay float32"""
    channels_last: bool = False
    """memory format of weights and images"""
    use_ema: bool = True
    """validate and save an exponential moving average of the weights"""
    ema_decay: float = 0.9999
    """largest decay per optimizer step"""
    ema_power: float = 0.75
    """warm-up: decay at step n is min(ema_decay, 1 - (1 + n) ** -ema_power)"""

    checkpointing_steps: int = 500
    """optimizer steps between checkpoints"""
    checkpoints_total_limit: int = 2
    """older checkpoints are deleted; 0 keeps all"""
    resume_from_checkpoint: str | None = None
    """`latest` (starts anew when there is none) or a checkpoint folder that you trust: it holds pickles"""
    validation_steps: int = 500
    """optimizer steps between validations"""
    log_steps: int = 50
    """optimizer steps averaged in one line of metrics.jsonl"""
    report_to: Literal["none", "tensorboard", "wandb", "all"] = "none"
    """tracker beside metrics.jsonl"""

    num_train_timesteps: int = 1000
    """steps T of the forward process"""
    beta_schedule: Literal["linear", "squaredcos_cap_v2"] = "linear"
    """noise schedule, as DDPMScheduler names it; squaredcos_cap_v2 is the cosine schedule"""

    model: str = "adm/digits"
    """named size of a network, family/name, see `diffusers_ext.models.PRESETS`; the options below change it"""
    sample_size: int | None = None
    """pixels; smaller images are enlarged by whole factors and padded with -1, larger ones resized and cropped"""
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


@dataclass(frozen=True)
class UNetTrainingConfig(TrainingConfig):
    """Train a backbone that removes noise and, with learned variance, says how certain each step is."""

    preset: Literal["digits", "mnist", "film-mnist", "dit-gqa-mnist", "ddpm-mnist", "dilated-mnist"] = "digits"
    """where the defaults of all other options come from"""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
    """what the network predicts: the noise, v of Salimans and Ho (2022), or the clean image"""
    learned_variance: bool = True
    """twice the output channels and the hybrid loss of improved-diffusion"""
    class_conditional: bool = False
    """the network sees the labels"""
    class_dropout_prob: float = 0.0
    """share of labels replaced by a null class, for classifier-free guidance; 0: the network has no null class"""
    validation_images: int = 64
    """images of each sample grid"""
    validation_inference_steps: int = 25
    """DDIM steps of each sample grid"""


@dataclass(frozen=True)
class ClassifierTrainingConfig(TrainingConfig):
    """Train a classifier of noisy images, for guidance."""

    model: str = "adm-classifier/digits"
    """named size of a classifier, family/name; the options below change it"""
    pool: Literal["attention", "adaptive", "spatial", "spatial_v2"] | None = None
    """from the last feature map to logits"""
    validation_split: str = "test"
    """split whose accuracy is measured at each quarter of the noise range"""
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
        max_train_steps=2500,
        adam_weight_decay=0.05,
        **_MNIST,
    ),
}
