"""What is found out about a network."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


Size = tuple[int, int]


@dataclass(frozen=True)
class Attention:
    """One attention layer.

    Args:
        heads: number of heads.
        head_dim: channels of each.
        queries: tokens that ask.
        keys: tokens that answer.
        kind: "self", "cross" (to another sequence, such as a text) or "pool" (one token asks).
        resolution: height and width of the pixels or patches that are its tokens; None where they form no grid.
    """

    heads: int
    head_dim: int
    queries: int
    keys: int
    kind: str
    resolution: Size | None


@dataclass(frozen=True)
class Block:
    """One block, in the order in which blocks run.

    Args:
        name: dotted name in the model; "" for what is in no block.
        kind: "in", "embedding", "down", "mid", "up", "block" or "out".
        module: name of its class.
        output_shape: of its output, batch first; None if it did not run.
        channels: of its output.
        resolution: height and width at which its layers work, before it changes them; None if it has none.
        attention: its attention layers.
        parameters: number of its parameters.
        flops: of a forward pass; a multiply-add counts 2.
        activation_bytes: what autograd keeps of it for the backward pass.
        receptive_field: height and width in pixels of the part of the image that the middle of its output sees.
    """

    name: str
    kind: str
    module: str
    output_shape: tuple[int, ...] | None = None
    channels: int | None = None
    resolution: Size | None = None
    attention: tuple[Attention, ...] = ()
    parameters: int = 0
    flops: int = 0
    activation_bytes: int = 0
    receptive_field: Size | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes, for the batch of the inspection.

    Args:
        weights: parameters and buffers.
        activations: what autograd keeps for the backward pass.
        gradients: of all parameters.
        optimizer: AdamW's two moments.
        forward_peak: of a forward pass without gradients, weights included.
        training_peak: of a training step in this dtype, all of the above included: forward, mean square, backward and
            a step of AdamW (multi-tensor, as on GPUs) whose moments exist already.
        training_peak_in: "forward", "backward" or "optimizer".
    """

    weights: int
    activations: int
    gradients: int
    optimizer: int
    forward_peak: int
    training_peak: int
    training_peak_in: str


@dataclass(frozen=True)
class ReceptiveField:
    """What the centre pixel of the output depends on; normalisation statistics aside.

    Args:
        size: height and width in pixels, also beyond the image; None if it grows with the image ("whole image").
        inside: height and width of it inside the image.
        exact: False where the network cannot run on larger images, which would have shown what lies beyond.
        unknown_operations: operations that were taken to mix everything, since nothing is known of them.
        effective: size in pixels of the effective one (Luo et al., 2016): square root of the number of pixels with
            more than 4.55% of the largest gradient; None if it was not measured.
        effective_of: which weights it was measured on, or why it was not.
    """

    size: Size | None
    inside: Size
    exact: bool = True
    unknown_operations: tuple[str, ...] = ()
    effective: float | None = None
    effective_of: str = ""


@dataclass(frozen=True)
class Precision:
    """Dtypes.

    Args:
        dtype: of the weights that were inspected.
        kept_in_float32: modules that loading in half precision leaves in float32 (`_keep_in_fp32_modules`).
        kept_in_float32_parameters: number of their parameters.
        not_cast: patterns of modules that layerwise casting leaves as they are (`_skip_layerwise_casting_patterns`).
        not_cast_parameters: number of their parameters.
        computed_in_float32: blocks and layers whose output is float32 in a model in half precision, seen in a pass.
    """

    dtype: str
    kept_in_float32: tuple[str, ...] = ()
    kept_in_float32_parameters: int = 0
    not_cast: tuple[str, ...] = ()
    not_cast_parameters: int = 0
    computed_in_float32: tuple[str, ...] = ()


@dataclass(frozen=True)
class Network:
    """Anatomy of one network.

    Args:
        name: of the part: preset, folder or Hub id.
        model_class: name of its class.
        input_shape: batch, channels, height and width (or batch, tokens, channels).
        output_shape: of its output.
        parameters: number of all parameters.
        flops: of a forward pass; a multiply-add counts 2.
        blocks: in the order in which they run.
        skips: connections past at least one block: from, to, number of tensors.
        memory, receptive_field, precision: see there.
    """

    name: str
    model_class: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    parameters: int
    flops: int
    blocks: tuple[Block, ...]
    skips: tuple[tuple[str, str, int], ...]
    memory: Memory
    receptive_field: ReceptiveField
    precision: Precision


@dataclass(frozen=True)
class Anatomy:
    """What one argument of the command named: a network, or several that belong together.

    Args:
        title: heading.
        networks: a UNet and its classifier, the networks of a pipeline, or just one.
    """

    title: str
    networks: tuple[Network, ...]

    @property
    def parameters(self) -> int:
        return sum(network.parameters for network in self.networks)

    @property
    def flops(self) -> int:
        return sum(network.flops for network in self.networks)


def to_dict(anatomies: Sequence[Anatomy]) -> dict[str, Any]:
    """Everything, as JSON has it."""
    entries = []
    for anatomy in anatomies:
        totals = {"parameters": anatomy.parameters, "flops": anatomy.flops}
        entries.append({"title": anatomy.title, **totals, "networks": [asdict(n) for n in anatomy.networks]})
    return {
        "schema": "diffusers_ext.anatomy/1",
        "units": {"flops": "a multiply-add counts 2", "memory": "bytes", "receptive_field": "pixels"},
        "models": entries,
    }
