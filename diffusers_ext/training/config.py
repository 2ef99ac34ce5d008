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

    sample_size: int = 8
    """pixels; smaller images are enlarged by whole factors and padded with -1, larger ones resized and cropped"""
    in_channels: int = 1
    """1 greyscale, 3 colour"""
    block_out_channels: tuple[int, ...] = (32, 64)
    """width of each resolution, highest first"""
    layers_per_block: int = 1
    """resnets per resolution"""
    attention_resolutions: tuple[int, ...] = (4,)
    """feature map sizes in pixels"""
    attention_head_dim: int = 32
    """channels per head"""
    norm_num_groups: int = 8
    """groups of every GroupNorm"""
    resample_type: Literal["resnet", "conv", "pool"] = "resnet"
    """how resolutions are connected"""
    resnet_time_scale_shift: Literal["scale_shift", "default"] = "scale_shift"
    """how the timestep enters: scale and shift after the second norm, or added before it"""
    dropout: float = 0.0
    """inside every resnet"""


@dataclass(frozen=True)
class UNetTrainingConfig(TrainingConfig):
    """Train an ADM UNet that predicts noise and, with learned variance, the variance of each step."""

    learned_variance: bool = True
    """twice the output channels and the hybrid loss of improved-diffusion"""
    class_conditional: bool = False
    """the network sees the labels"""
    validation_images: int = 64
    """images of each sample grid"""
    validation_inference_steps: int = 25
    """DDIM steps of each sample grid"""


@dataclass(frozen=True)
class ClassifierTrainingConfig(TrainingConfig):
    """Train a classifier of noisy images, for guidance."""

    pool: Literal["attention", "adaptive", "spatial", "spatial_v2"] = "attention"
    """from the last feature map to logits"""
    validation_split: str = "test"
    """split whose accuracy is measured at each quarter of the noise range"""
    validation_images: int = 1000
    """images of each validation"""


_MNIST = {
    "preset": "mnist",
    "dataset": "ylecun/mnist",
    "sample_size": 32,
    "attention_resolutions": (8,),
    "mixed_precision": "bf16",
    "checkpointing_steps": 250,
}

UNET_PRESETS = {
    "digits": UNetTrainingConfig(output_dir="runs/digits-unet"),
    "mnist": UNetTrainingConfig(
        **_MNIST, output_dir="runs/mnist-unet", block_out_channels=(16, 48, 96), max_train_steps=4500
    ),
}

CLASSIFIER_PRESETS = {
    "digits": ClassifierTrainingConfig(output_dir="runs/digits-classifier", adam_weight_decay=0.05),
    "mnist": ClassifierTrainingConfig(
        **_MNIST,
        output_dir="runs/mnist-classifier",
        block_out_channels=(16, 48, 64),
        max_train_steps=2500,
        adam_weight_decay=0.05,
    ),
}
