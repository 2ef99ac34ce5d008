"""Two-way renaming and reshaping of state dicts, as data.

A `Rule` says which tensors of the original are which of ours, and its `Operation` how they become each other. The same
list of rules converts in both directions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch


Tensors = list[torch.Tensor]
StateDict = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Operation:
    """A change of tensors and its exact inverse."""

    to_ours: Callable[[Tensors], Tensors]
    to_original: Callable[[Tensors], Tensors]


@dataclass(frozen=True)
class Rule:
    """`operation` turns the tensors named `original` into those named `ours`, and back."""

    original: tuple[str, ...]
    ours: tuple[str, ...]
    operation: Operation


KEEP = Operation(list, list)
TRANSPOSE = Operation(lambda tensors: [tensors[0].T.contiguous()], lambda tensors: [tensors[0].T.contiguous()])


def pointwise(ndim: int) -> Operation:
    """Weight of a 1x1 convolution with `ndim` dimensions (O, I, 1, ...) -> weight of a linear layer (O, I)."""
    return Operation(
        lambda tensors: [_drop_pixels(tensors[0])],
        lambda tensors: [_add_pixels(tensors[0], ndim)],
    )


def split_qkv(groups: int, ndim: int) -> Operation:
    """Rows [group][q|k|v][channel] of one 1x1 convolution with `ndim` dimensions -> three linear layers q, k, v.

    `groups` is the number of heads where each head's q, k and v lie together, and 1 where all of q comes first.
    """

    def to_ours(tensors: Tensors) -> Tensors:
        rows = _drop_pixels(tensors[0]).unflatten(0, (groups, 3, -1)).transpose(0, 1)  # (3, groups, channels, ...)
        return [part.flatten(0, 1).clone() for part in rows]

    def to_original(tensors: Tensors) -> Tensors:
        rows = torch.stack(tensors).unflatten(1, (groups, -1)).transpose(0, 1)  # (groups, 3, channels, ...)
        return [_add_pixels(rows.flatten(0, 2), ndim)]

    return Operation(to_ours, to_original)


def stack(sizes: Sequence[int]) -> Operation:
    """Several layers that read the same input -> one layer, their rows below each other."""
    return Operation(
        lambda tensors: [torch.cat(tensors)],
        lambda tensors: [part.clone() for part in tensors[0].split(list(sizes))],
    )


def _drop_pixels(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten(1) if tensor.ndim > 1 else tensor


def _add_pixels(tensor: torch.Tensor, ndim: int) -> torch.Tensor:
    return tensor.reshape(*tensor.shape, *[1] * (ndim - 2)) if tensor.ndim > 1 else tensor


def to_ours(state_dict: Mapping[str, torch.Tensor], rules: Sequence[Rule]) -> StateDict:
    converted = {}
    for rule in rules:
        tensors = rule.operation.to_ours([state_dict[key] for key in rule.original])
        converted.update(zip(rule.ours, tensors, strict=True))
    return converted


def to_original(state_dict: Mapping[str, torch.Tensor], rules: Sequence[Rule]) -> StateDict:
    converted = {}
    for rule in rules:
        tensors = rule.operation.to_original([state_dict[key] for key in rule.ours])
        converted.update(zip(rule.original, tensors, strict=True))
    return converted


def check_layout(state_dict: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], problem: str) -> None:
    """Raise a `ValueError` that lists every key of `state_dict` that is missing, unknown, or of another shape."""
    lines = [f"missing: {key} {_shape(expected[key])}" for key in expected if key not in state_dict]
    lines += [f"unknown: {key} {_shape(state_dict[key])}" for key in state_dict if key not in expected]
    lines += [
        f"shape: {key} {_shape(state_dict[key])}, expected {_shape(expected[key])}"
        for key in expected
        if key in state_dict and state_dict[key].shape != expected[key].shape
    ]
    if lines:
        listing = "\n  ".join(lines)
        raise ValueError(f"{problem}, in {len(lines)} keys:\n  {listing}")


def _shape(tensor: torch.Tensor) -> str:
    return str(tuple(tensor.shape))
