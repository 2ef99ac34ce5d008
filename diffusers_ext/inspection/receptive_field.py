"""Receptive field of any network: which input pixels can reach an output, and which do in effect.

The theoretical one is exact and independent of weights. A forward pass on the meta device carries beside every tensor,
for each of its elements, the smallest rectangle of input pixels that the element depends on, and each operation
merges the rectangles of what it reads: a convolution those under its taps, a matrix product those of a row and a
column, attention those of a query, all keys and all values. Norms are taken position by position: that the statistics
of a group norm see the whole image is not what is called a receptive field.

The effective one is that of Luo et al., "Understanding the Effective Receptive Field in Deep Convolutional Neural
Networks" (2016), https://arxiv.org/abs/1701.04128, Sec. 3: the gradient of the centre pixel by the input.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary


# Share of the largest gradient above which Luo et al. count a pixel: outside two deviations of a Gaussian, 1 - 95.45%.
EFFECTIVE_THRESHOLD = 0.0455

aten = torch.ops.aten


@dataclass(frozen=True)
class Rectangle:
    """Input pixels `top <= y <= bottom`, `left <= x <= right`."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.bottom - self.top + 1, self.right - self.left + 1


# Top, left, -bottom and -right of the rectangle of every element, so that merging is `minimum` throughout; infinite
# where an element depends on no pixel. Each has as many dimensions as its tensor, of size 1 where all entries agree.
Footprint = list[torch.Tensor]

_NOTHING = float("inf")
_FACTORY = re.compile(r"::(new_|empty|zeros|ones|full|rand)")  # these take shapes from tensors, not values
_COPIES = {aten._to_copy, aten.clone, aten.detach, aten.alias, aten.contiguous, aten.lift_fresh, aten.native_dropout}
_RESHAPES = {aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias}
_PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.matmul}
_NORMS = {aten.native_group_norm, aten.native_batch_norm, aten._native_batch_norm_legit, aten._batch_norm_with_update}
_ATTENTIONS = {
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu,
}
# Elements are moved or repeated: the operation does to the rectangles what it does to the values.
_MOVES = {aten.repeat, aten.flip, aten.roll, aten.pixel_shuffle, aten.pixel_unshuffle}
_MOVES |= {aten.reflection_pad2d, aten.replication_pad2d}
_POOLS = {aten.avg_pool2d, aten.max_pool2d_with_indices, aten.max_pool2d, aten.avg_pool1d}


class FootprintMode(TorchDispatchMode):
    """Carries the footprints of all tensors that depend on `image` through what runs under it, without gradients.

    Args:
        image: `(B, C, H, W)` pixels, or `(B, L, C)` tokens of `grid`.
        grid: height and width of the pixels or tokens.

    Attributes:
        whole: names of operations without a rule, whose outputs were taken to depend on all of their inputs.
        attended: whether there was attention over what depends on the image.
    """

    def __init__(self, image: torch.Tensor, grid: tuple[int, int]):
        super().__init__()
        self.whole: set[str] = set()
        self.attended = False
        self._table = WeakTensorKeyDictionary()
        self._fresh = WeakTensorKeyDictionary()
        height, width = grid
        y, x = torch.arange(height, dtype=torch.float32), torch.arange(width, dtype=torch.float32)
        if image.ndim == 4:
            y, x = y.view(1, 1, -1, 1), x.view(1, 1, 1, -1)
        else:
            y, x = y.repeat_interleave(width).view(1, -1, 1), x.repeat(height).view(1, -1, 1)
        self._table[image] = [y, x, -y, -x]

    def depends(self, tensor: torch.Tensor) -> bool:
        return tensor in self._table

    def take_positions(self, output: torch.Tensor, sources: Sequence[torch.Tensor]) -> None:
        """Let `output` see at each position what `sources` of the same shape do there, over all channels."""
        dim = 1 if output.ndim == 4 else -1
        sides = zip(*(self._table[source] for source in sources if source in self._table))
        footprint = [_merge([part.amin(dim, keepdim=True) for part in side], output.ndim) for side in sides]
        if footprint:
            self._table[output] = footprint

    def centre(self, output: torch.Tensor, grid: tuple[int, int] | None) -> Rectangle | None:
        """What the middle position of `output` depends on; without a grid of positions, what all of it does.

        Args:
            output: `(B, C, h, w)`, or `(B, L, C)` of L = h w tokens, or anything.
            grid: h and w.
        """
        if output not in self._table:
            return None
        values = []
        for part in self._table[output]:
            if grid is not None and output.ndim == 4:
                part = part[..., min(grid[0] // 2, part.shape[2] - 1), min(grid[1] // 2, part.shape[3] - 1)]
            elif grid is not None:
                part = part[:, min(grid[0] // 2 * grid[1] + grid[1] // 2, part.shape[1] - 1)]
            values.append(part.min().item())
        top, left, bottom, right = values
        return None if math.isinf(top) else Rectangle(int(top), int(left), int(-bottom), int(-right))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        packet = func.overloadpacket
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
        is_view = any(result.alias_info and not result.alias_info.is_write for result in func._schema.returns)
        for tensor in inputs if is_view else []:
            if tensor in self._fresh:  # its views may be written, element by element if it is not too large
                shape = tensor.shape if tensor.numel() <= 2**22 else (1,) * tensor.ndim
                self._table[tensor] = [torch.full(shape, _NOTHING) for _ in range(4)]
                del self._fresh[tensor]
        if not inputs or _FACTORY.search(name := func.name()) and not name.split(".")[0].endswith("_"):
            self._fresh.update({tensor: None for tensor in outputs})
            return output
        if not any(tensor in self._table for tensor in inputs):
            return output

        results = [self._apply(packet, func, args, kwargs, outputs, side, is_view) for side in range(4)]
        writes = func._schema.is_mutable
        for index, tensor in enumerate(outputs):
            footprint = [parts[index] for parts in results if parts[index] is not None]
            if not footprint:
                continue
            if writes:
                self._write(tensor, footprint)
            else:
                self._table[tensor] = footprint
        return output

    def _write(self, tensor: torch.Tensor, footprint: Footprint) -> None:
        """An operation in place: `tensor` may be a view of others, which change with it."""
        old = self._table.get(tensor)
        self._fresh.pop(tensor, None)
        if old is not None and old[0].shape == tensor.shape and tensor.numel() > 1:
            for part, new in zip(old, footprint):
                part.copy_(new)  # a view as well
            return
        self._table[tensor] = footprint
        storage = tensor.untyped_storage()._cdata
        for other in list(self._table):
            if other is not tensor and other.untyped_storage()._cdata == storage:
                self._table[other] = [torch.minimum(a, b.min()) for a, b in zip(self._table[other], footprint)]

    def _side(self, tensor: Any, side: int) -> torch.Tensor | None:
        if not isinstance(tensor, torch.Tensor) or tensor not in self._table:
            return None
        return self._table[tensor][side]

    def _apply(self, packet, func, args, kwargs, outputs, side: int, is_view: bool) -> list[torch.Tensor | None]:
        """One side of the rectangles of each of `outputs`."""
        first = self._side(args[0], side) if args else None
        name = packet.__name__
        if packet is aten.convolution:
            if first is not None and not any(self.depends(x) for x in args[1:3] if x is not None):
                return [_convolution(first, args[1], outputs[0], *args[3:9])]
        elif packet in _PRODUCTS:
            *bias, a, b = args[:3] if "add" in name or "bad" in name else args[:2]
            rows, columns = self._side(a, side), self._side(b, side)
            rows = None if rows is None else rows.amin(-1, keepdim=True)
            columns = None if columns is None else columns.amin(-2, keepdim=True)
            return [_compact(_merge([rows, columns, *(self._side(x, side) for x in bias)], outputs[0].ndim))]
        elif packet in _ATTENTIONS:
            query, key, value = (self._side(x, side) for x in args[:3])
            self.attended |= key is not None
            parts = [None if query is None else query.amin(-1, keepdim=True)]
            parts += [x.amin((-2, -1), keepdim=True) for x in (key, value) if x is not None]
            return [_compact(_merge(parts, outputs[0].ndim))] + [None] * (len(outputs) - 1)
        elif packet in _NORMS or packet in (aten.native_layer_norm, aten._fused_rms_norm):
            if first is not None:
                dim = -1 if packet not in _NORMS else 1
                return [first.amin(dim, keepdim=True) if packet is not aten.native_batch_norm else first] + [None] * (
                    len(outputs) - 1
                )
        elif packet in _RESHAPES:
            return [_reshape(first, args[0].shape, outputs[0].shape)]
        elif packet is aten.copy_:
            source = self._side(args[1], side)
            return [torch.full((1,) * outputs[0].ndim, _NOTHING) if source is None else _pad_ndim(source, outputs[0])]
        elif packet in _COPIES or torch.Tag.pointwise in func.tags:
            leaves = tree_leaves((args, kwargs))
            return [_merge([self._side(leaf, side) for leaf in leaves], out.ndim) for out in outputs]
        elif is_view or packet in _MOVES:
            moved = func(first.expand(args[0].shape), *args[1:], **kwargs)
            return [_collapse(part) for part in (moved if isinstance(moved, (list, tuple)) else [moved])]
        elif packet is aten.constant_pad_nd:
            # Along a dimension whose entries agree, the margin may as well agree with them.
            margins = [0 if first.shape[-1 - i // 2] == 1 else margin for i, margin in enumerate(args[1])]
            return [F.pad(first, margins, value=_NOTHING)]
        elif packet in (aten.cat, aten.stack):
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            return [_join(packet, [(x, self._side(x, side)) for x in args[0]], dim)]
        elif packet in _POOLS:
            kernel, stride = args[1], args[2] if len(args) > 2 and args[2] else args[1]
            padding = args[3] if len(args) > 3 else 0
            dims = outputs[0].ndim - 2
            kernel, stride, padding = (_per_axis(x, dims) for x in (kernel, stride, padding))
            part = _windows(first, outputs[0].shape[2:], kernel, stride, padding, [1] * dims)
            return [part] * len(outputs)
        elif packet in (aten.upsample_nearest1d, aten.upsample_nearest2d):
            for dim in range(2, first.ndim):
                if first.shape[dim] > 1:
                    old, new = args[0].shape[dim], outputs[0].shape[dim]
                    first = first.index_select(dim, torch.arange(new) * old // new)
            return [first]
        elif packet in (aten._adaptive_avg_pool2d, aten.adaptive_max_pool2d, aten.upsample_bilinear2d):
            return [_resized(first, args[0].shape, outputs[0].shape)] * len(outputs)
        elif packet in (aten._softmax, aten._log_softmax, aten.cumsum, aten._safe_softmax):
            return [first.amin(args[1], keepdim=True)]
        elif _reduced_dims(func, args, kwargs) is not None:
            dims, keep = _reduced_dims(func, args, kwargs)
            part = first.amin(dims, keepdim=True) if args[0].ndim else first
            if not keep:
                part = part.reshape([n for d, n in enumerate(part.shape) if d not in dims])
            return [part] * len(outputs)
        # No rule: everything may reach everything.
        parts = [self._side(leaf, side) for leaf in tree_leaves((args, kwargs))]
        least = min(part.min().item() for part in parts if part is not None)
        if least < _NOTHING and any(part.numel() > 1 for part in parts if part is not None):
            self.whole.add(name)
        return [torch.full((1,) * out.ndim, least) for out in outputs]


def _merge(parts: Iterable[torch.Tensor | None], ndim: int) -> torch.Tensor:
    merged = torch.full((1,) * ndim, _NOTHING)
    for part in parts:
        if part is not None:
            merged = torch.minimum(merged, part)
    return merged


def _pad_ndim(part: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    return part.reshape((1,) * (tensor.ndim - part.ndim) + tuple(part.shape))


def _collapse(part: torch.Tensor) -> torch.Tensor:
    """Size 1 along dimensions that were only expanded."""
    for dim, stride in enumerate(part.stride()):
        if stride == 0 and part.shape[dim] > 1:
            part = part.narrow(dim, 0, 1)
    return part


def _compact(part: torch.Tensor) -> torch.Tensor:
    """Size 1 along dimensions whose entries agree."""
    for dim, length in enumerate(part.shape):
        if length > 1 and torch.equal(part.narrow(dim, 1, length - 1), part.narrow(dim, 0, length - 1)):
            part = part.narrow(dim, 0, 1)
    return part


def _reshape(part: torch.Tensor, old: torch.Size, new: torch.Size) -> torch.Tensor:
    """Reshape what stands for a tensor from shape `old` to `new`, without filling dimensions whose entries agree."""
    shape: list[int] = []
    part_shape: list[int] = []
    i = j = 0
    expand = list(part.shape)
    while i < len(old) or j < len(new):
        start, first, before, after = i, j, 1, 1
        if i < len(old):
            before, i = old[i], i + 1
        if j < len(new):
            after, j = new[j], j + 1
        while before != after:  # the smallest groups of dimensions with equal products
            if before < after:
                before, i = before * old[i], i + 1
            else:
                after, j = after * new[j], j + 1
        varies = any(part.shape[d] > 1 for d in range(start, i))
        if varies:
            expand[start:i] = old[start:i]
        part_shape += new[first:j] if varies else [1] * (j - first)
        shape += new[first:j]
    return _compact(part.expand(expand).reshape(part_shape))


def _join(packet, inputs: list[tuple[torch.Tensor, torch.Tensor | None]], dim: int) -> torch.Tensor:
    inputs = [(x, part) for x, part in inputs if x.shape != (0,)]
    ndim = inputs[0][0].ndim
    dim %= ndim + (packet is aten.stack)
    parts = [torch.full((1,) * ndim, _NOTHING) if part is None else part for _, part in inputs]
    common = list(torch.broadcast_shapes(*([n if d != dim else 1 for d, n in enumerate(p.shape)] for p in parts)))
    if packet is aten.stack:
        common = torch.broadcast_shapes(*(part.shape for part in parts))
        return torch.stack([part.expand(common) for part in parts], dim)
    if all(part.numel() == 1 for part in parts) and len({part.item() for part in parts}) == 1:
        return parts[0]
    if dim == 1 and ndim == 4 and math.prod(common) * sum(x.shape[1] for x, _ in inputs) > 2**18:
        return _merge(parts, ndim).amin(1, keepdim=True)  # the next layer mixes the channels anyway
    lengths = [common[:dim] + [x.shape[dim]] + common[dim + 1 :] for x, _ in inputs]
    return torch.cat([part.expand(length) for part, length in zip(parts, lengths)], dim)


def _per_axis(value: int | list[int], dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return values * dims if len(values) == 1 else values


def _windows(
    part: torch.Tensor, size: Iterable[int], kernel, stride, padding, dilation, transposed: bool = False
) -> torch.Tensor:
    """Least entry under the taps of a window, over the dimensions from the third on; padding holds nothing."""
    for axis, length in enumerate(size):
        dim = 2 + axis
        if part.shape[dim] == 1:
            continue
        taps, step, spacing = kernel[axis], stride[axis], dilation[axis]
        before = padding[axis]
        if transposed:
            spread = list(part.shape)
            spread[dim] = (part.shape[dim] - 1) * step + 1
            index = torch.arange(part.shape[dim]) * step
            part = torch.full(spread, _NOTHING).index_copy(dim, index, part)
            before, step = spacing * (taps - 1) - padding[axis], 1
        span = (length - 1) * step + spacing * (taps - 1) + 1
        pad = [0, 0] * (part.ndim - dim - 1) + [before, max(0, span - before - part.shape[dim])]
        padded = F.pad(part, pad, value=_NOTHING)  # a negative margin crops
        reach = (length - 1) * step + 1
        slices = [padded.narrow(dim, tap * spacing, reach) for tap in range(taps)]
        least = slices[0]
        for other in slices[1:]:
            least = torch.minimum(least, other)
        part = least.index_select(dim, torch.arange(0, reach, step))
    return part


def _convolution(
    part: torch.Tensor, weight, output, stride, padding, dilation, transposed: bool, _, groups: int
) -> torch.Tensor:
    dims = weight.ndim - 2
    if groups > 1 and part.shape[1] > 1:
        part = part.unflatten(1, (groups, -1)).amin(2)
        part = part.repeat_interleave(output.shape[1] // groups, dim=1)
    else:
        part = part.amin(1, keepdim=True)
    stride, padding, dilation = (_per_axis(value, dims) for value in (stride, padding, dilation))
    return _windows(part, output.shape[2:], weight.shape[2:], stride, padding, dilation, transposed)


def _resized(part: torch.Tensor, old: torch.Size, new: torch.Size) -> torch.Tensor:
    """Adaptive pooling and bilinear resizing: the entries that an output's cell touches, and its neighbours."""
    for dim in range(2, len(old)):
        if part.shape[dim] == 1:
            continue
        scale = old[dim] / new[dim]
        reach = 0 if scale >= 1 and old[dim] % new[dim] == 0 else 1
        cells = []
        for i in range(new[dim]):
            start = max(0, math.floor(i * scale) - reach)
            stop = min(old[dim], math.ceil((i + 1) * scale) + reach)
            cells.append(part.narrow(dim, start, stop - start).amin(dim, keepdim=True))
        part = torch.cat(cells, dim)
    return part


def _reduced_dims(func, args, kwargs) -> tuple[list[int], bool] | None:
    """Dimensions over which `func` takes a mean, a sum, a maximum ..., and whether it keeps them."""
    reductions = ("mean", "sum", "amax", "amin", "max", "min", "var", "std", "prod", "norm", "logsumexp", "var_mean")
    if func.overloadpacket.__name__.replace("linalg_vector_", "") not in reductions:
        return None
    if sum(isinstance(leaf, torch.Tensor) for leaf in tree_leaves((args, kwargs))) != 1:
        return None
    given = dict(zip([argument.name for argument in func._schema.arguments], args)) | kwargs
    ndim, dims = args[0].ndim, given.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    dims = [d % ndim for d in dims] if dims else list(range(ndim))
    return dims, bool(given.get("keepdim", False))


def effective_receptive_field(
    run: Callable[[torch.Tensor], torch.Tensor],
    shape: tuple[int, ...],
    samples: int = 8,
    generator: torch.Generator | None = None,
) -> tuple[float, torch.Tensor]:
    """Measured influence of the input pixels on the centre pixel of the output.

    Args:
        run: a network `(B, C, H, W) -> (B, C', h, w)` on real weights.
        shape: C, H and W.
        samples: inputs of normal noise to average over.
        generator: of that noise.

    Returns:
        The size in pixels, the square root of how many pixels have more than 4.55% of the largest gradient; and the
        gradients' magnitudes `(H, W)`, relative to the largest.

    Raises:
        ValueError: when no pixel has a gradient, as for a network whose last layer is zero.
    """
    total = torch.zeros(shape[1:])
    for _ in range(samples):
        image = torch.randn(1, *shape, generator=generator).requires_grad_()
        output = run(image)
        centre = output[..., output.shape[2] // 2, output.shape[3] // 2] if output.ndim == 4 else output
        # A sum over channels with signs, so that their gradients cannot cancel for every input.
        signs = torch.randint(0, 2, centre.shape, generator=generator) * 2 - 1
        (gradient,) = torch.autograd.grad((centre * signs).sum(), image)
        total += gradient[0].abs().sum(dim=0)
    if not total.max() > 0:
        raise ValueError("`run` has no gradient by its input: its last layer may still be zero.")
    total /= total.max()
    return math.sqrt((total > EFFECTIVE_THRESHOLD).sum().item()), total


def fill_zero_layers(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draw layers anew whose weights are all zero, through which no gradient passes before training."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.ndim > 1 and not weight.any():
            with torch.no_grad():
                weight.normal_(0, weight[0].numel() ** -0.5, generator=generator)
