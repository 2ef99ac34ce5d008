"""Passes through a network on the meta device, and what is read off each."""

import functools
import math
import re
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.weak import WeakTensorKeyDictionary

from diffusers import ModelMixin

from diffusers_ext.hub.safety import check_folder
from diffusers_ext.inspection.anatomy import Attention, Block, Memory, Network, Precision, ReceptiveField, Size
from diffusers_ext.inspection.inputs import TIMESTEP, example_inputs
from diffusers_ext.inspection.receptive_field import (
    FootprintMode,
    Rectangle,
    effective_receptive_field,
    fill_zero_layers,
)
from diffusers_ext.inspection.sources import Source, build, quiet, weights_dtype


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Children of these names are lists of blocks, in our models and in diffusers'.
BLOCK_LISTS = ("down_blocks", "up_blocks", "transformer_blocks", "single_transformer_blocks", "blocks", "layers")
# Without being asked, the effective receptive field is measured where that takes seconds, on as many images.
EFFECTIVE_PARAMETERS, EFFECTIVE_FLOPS, EFFECTIVE_SAMPLES = 80e6, 10e9, 8


class _Trace:
    """Which module runs, and what modules return: hooks on all of them, while entered."""

    def __init__(self, model: nn.Module, blocks: Sequence[str]):
        self.model = model
        self.outputs: dict[str, list[torch.Tensor | torch.Size]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.order: list[str] = []
        self.stack: list[str] = []
        self.on_output = None
        # A module's block is the one whose name its own begins with.
        chosen = set(blocks)
        self.block_of = {
            name: next((prefix for prefix in _prefixes(name) if prefix in chosen), "")
            for name, _ in model.named_modules()
        }

    @property
    def block(self) -> str:
        """Name of the block that runs, "" outside of all."""
        return self.block_of[self.stack[-1]] if self.stack else ""

    def __enter__(self):
        self._handles = []
        for name, module in self.model.named_modules():
            before = module.register_forward_pre_hook(functools.partial(self._before, name))
            after = module.register_forward_hook(functools.partial(self._after, name), with_kwargs=True)
            self._handles += [before, after]
        return self

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()
        self.stack.clear()

    def _before(self, name: str, module: nn.Module, args: tuple) -> None:
        self.stack.append(name)
        if self.block and self.block not in self.order:
            self.order.append(self.block)

    def _after(self, name: str, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        main = _main_tensor(output)
        if main is not None:
            # The dict keeps the order in which modules finish first: leaves before what they are in.
            self.outputs.setdefault(name, main.shape)
            self.dtypes.setdefault(name, main.dtype)
        if self.on_output is not None:
            self.on_output(name, module, (args, kwargs), main)
        self.stack.pop()


def _prefixes(name: str) -> Iterator[str]:
    """The name itself, then those of all that it is in."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _main_tensor(output: Any) -> torch.Tensor | None:
    """What of a module's output goes on to the next: the hidden states, not the copies for skip connections."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, dict):  # diffusers' outputs are
        output = tuple(output.values())
    if not isinstance(output, (tuple, list)):
        values = vars(output).values() if hasattr(output, "__dict__") else ()
        return next((value for value in values if isinstance(value, torch.Tensor)), None)
    tensors = [value for value in output if isinstance(value, torch.Tensor)]
    if not tensors:
        return None
    return tensors[0] if any(isinstance(value, (tuple, list)) for value in output) else tensors[-1]


class _FusedAttention(TorchFunctionMode):
    """Runs attention as the one operation that it is on GPUs, and notes heads and tokens of every call."""

    def __init__(self, trace: _Trace):
        super().__init__()
        self.trace = trace
        self.calls: list[tuple[str, str, torch.Size, torch.Size]] = []  # block, module, shapes of query and key

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = dict(zip(names, args)) | kwargs
        query, key, value = given["query"], given["key"], given["value"]
        if query.ndim != 4:
            return func(*args, **kwargs)
        module = self.trace.stack[-1] if self.trace.stack else ""
        self.calls.append((self.trace.block, module, query.shape, key.shape))
        if query.shape[1] != key.shape[1]:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        mask = given.get("attn_mask")
        if mask is not None:
            mask = mask.to(query.dtype).expand(*query.shape[:3], key.shape[2])
        output = torch.ops.aten._scaled_dot_product_efficient_attention(
            query,
            key,
            value,
            mask,
            torch.is_grad_enabled(),
            given.get("dropout_p", 0.0),
            given.get("is_causal", False),
            scale=given.get("scale"),
        )
        return output[0]


class _LiveMemory(TorchDispatchMode):
    """Bytes of the storages that are alive, and their maximum."""

    def __init__(self, alive: Sequence[torch.Tensor] = ()):
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}
        for tensor in alive:
            self._count(tensor)

    def reset_peak(self) -> int:
        """The maximum so far; the next one starts from now."""
        peak, self.peak = self.peak, self.live
        return peak

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.device.type == "meta" and key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf)
        return output


class _Flow(FootprintMode):
    """Footprints, and which blocks read what which others made."""

    def __init__(self, trace: _Trace, image: torch.Tensor, grid: Size):
        super().__init__(image, grid)
        self.trace = trace
        self.edges: dict[tuple[str, str], set[int]] = {}
        self._made = WeakTensorKeyDictionary()
        self._serial = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        output = super().__torch_dispatch__(func, types, args, kwargs)
        block = self.trace.block
        made = {}
        for tensor in inputs:
            made |= self._made.get(tensor, {})
        if block:
            for serial, maker in made.items():
                if maker != block:
                    self.edges.setdefault((maker, block), set()).add(serial)
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and self.depends(tensor):
                if block:
                    self._serial += 1
                    self._made[tensor] = {self._serial: block}
                else:
                    self._made[tensor] = made
        return output


def inspect_source(
    source: Source,
    size: int | None = None,
    batch_size: int = 1,
    dtype: str | None = None,
    effective: str = "auto",
    memory: bool = True,
) -> Network:
    """Anatomy of one network; arguments and errors as for [`inspect_models`].

    `memory` False leaves all bytes but those of the weights at 0, which takes half the time.
    """
    dtype = dtype or weights_dtype(source.folder) or "float32"
    model = build(source)
    kept = _kept_in_float32(model)
    _cast(model, DTYPES[dtype], kept)
    with quiet():
        try:
            arguments, image, grid = example_inputs(model, size, batch_size, DTYPES[dtype])
            network = _inspect(model, source.name, arguments, image, grid, memory)
        except (RuntimeError, AssertionError, IndexError) as error:
            reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
            shown = "x".join(str(n) for n in (size, size)) if size else "the size of its config"
            raise ValueError(
                f"`size`: {type(model).__name__} ({source.name}) cannot run on images of {shown}: {reason}"
            ) from error
        field = _measure_effective(source, network, grid, effective)
        network = replace(network, receptive_field=replace(network.receptive_field, **field))
        precision = _precision(model, dtype, kept, size)
    return replace(network, precision=precision)


def activation_bytes(model: ModelMixin, size: int | None, batch_size: int) -> int:
    """Bytes that a training step in float32 keeps between its forward and backward pass.

    With gradient checkpointing these are the inputs of the checkpointed blocks, and the activations of the largest
    block, which exist while it is run for the second time.

    Args:
        model: a network on the meta device, with or without gradient checkpointing.
        size: height and width of the images in pixels; None takes that of its config.
        batch_size: number of images.
    """
    arguments, _, _ = example_inputs(model, size, batch_size, torch.float32)
    checkpointing = model.is_gradient_checkpointing
    with quiet():
        kept = sum(_saved_bytes(model, arguments, []).values())
        if checkpointing:
            model.disable_gradient_checkpointing()
            kept += max(_saved_bytes(model, arguments, find_blocks(model)).values())
            model.enable_gradient_checkpointing()
    return kept


def find_blocks(model: nn.Module) -> list[str]:
    """Names of the blocks that a model consists of: members of its lists, and what stands beside them."""
    names: list[str] = []

    def visit(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            is_container = isinstance(child, nn.ModuleList) or any(
                isinstance(getattr(child, word, None), nn.ModuleList) and len(getattr(child, word)) > 0
                for word in BLOCK_LISTS
            )
            if is_container:
                visit(child, f"{prefix}{name}.")
            else:
                names.append(f"{prefix}{name}")

    visit(model, "")
    return names


def _inspect(
    model: ModelMixin, name: str, arguments: dict[str, Any], image: torch.Tensor, grid: Size, with_memory: bool
) -> Network:
    names = find_blocks(model)
    trace = _Trace(model, names)
    tensors = [*model.parameters(), *model.buffers()]
    inputs = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
    weights = sum(storage_bytes(tensors).values())

    # FLOPs, shapes and attention.
    with torch.no_grad(), trace, _FusedAttention(trace) as attention, FlopCounterMode(display=False) as counter:
        output = _main_tensor(model(**arguments))
    output_shape = tuple(output.shape)
    counts = counter.get_flop_counts()
    flops = {block: sum(counts.get(f"{type(model).__name__}.{block}", {}).values()) for block in names}

    # Peak of a forward pass.
    del output
    forward_peak, training = 0, _NO_TRAINING
    if with_memory:
        with torch.no_grad(), _FusedAttention(trace), _LiveMemory([*tensors, *inputs]) as memory:
            model(**arguments)
        forward_peak = memory.peak
        training = _training_memory(model, arguments, [*tensors, *inputs], names)
    fields, edges, unknown, blocks_fields = _receptive_field(model, arguments, image, grid, names)

    order = trace.order + [block for block in names if block not in trace.order]
    modules = dict(model.named_modules())
    numel = {block: sum(p.numel() for p in modules[block].parameters()) for block in names}
    called = _attention_layers(model, trace, attention.calls, grid)
    blocks = []
    first_body = next((i for i, block in enumerate(order) if _list_of(block)), len(order))
    downs = [i for i, block in enumerate(order) if _list_of(block) == "down_blocks"]
    ups = [i for i, block in enumerate(order) if _list_of(block) == "up_blocks"]
    between = range(downs[-1], ups[0]) if downs and ups else range(0)
    for index, block in enumerate(order):
        shape = trace.outputs.get(block)
        if not (numel[block] or flops[block] or called.get(block)):
            continue  # activation functions, dropout
        working = _working_shape(block, trace.outputs)
        blocks.append(
            Block(
                name=block,
                kind=_kind(block, shape, index < first_body, index in between),
                module=type(modules[block]).__name__,
                output_shape=None if shape is None else tuple(shape),
                channels=None if shape is None else shape[1] if len(shape) == 4 else shape[-1],
                resolution=_resolution(working, grid),
                attention=tuple(called.get(block, ())),
                parameters=numel[block],
                flops=flops[block],
                activation_bytes=training["saved"].get(block, 0),
                receptive_field=blocks_fields.get(block),
            )
        )
    total_parameters = sum(p.numel() for p in model.parameters())
    total_flops = counter.get_total_flops()
    rest = Block(
        name="",
        kind="out",
        module="(outside of blocks)",
        parameters=total_parameters - sum(block.parameters for block in blocks),
        flops=total_flops - sum(block.flops for block in blocks),
        activation_bytes=training["activations"] - sum(block.activation_bytes for block in blocks),
        attention=tuple(called.get("", ())),
    )
    if rest.parameters or rest.flops or rest.activation_bytes:
        blocks.append(rest)
    position = {block.name: index for index, block in enumerate(blocks) if block.name}
    # What the next block on the image's way reads is the main path.
    way = sorted({end for edge in edges for end in edge if end in position}, key=position.get)
    skips = tuple(
        (start, end, count)
        for (start, end), count in edges.items()
        if start in way and end in way and way.index(end) > way.index(start) + 1
    )
    return Network(
        name=name,
        model_class=type(model).__name__,
        input_shape=tuple(image.shape),
        output_shape=output_shape,
        parameters=total_parameters,
        flops=total_flops,
        blocks=tuple(blocks),
        skips=skips,
        memory=Memory(
            weights=weights,
            activations=training["activations"],
            gradients=training["gradients"],
            optimizer=training["optimizer"],
            forward_peak=forward_peak,
            training_peak=training["peak"],
            training_peak_in=training["peak_in"],
        ),
        receptive_field=replace(fields, unknown_operations=tuple(sorted(unknown))),
        precision=Precision("float32"),
    )


_NO_TRAINING = {"saved": {}, "activations": 0, "gradients": 0, "optimizer": 0, "peak": 0, "peak_in": "forward"}


def storage_bytes(tensors: Sequence[torch.Tensor]) -> dict[int, int]:
    """Bytes of each storage that the tensors are in."""
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}


def _training_memory(
    model: ModelMixin, arguments: dict[str, Any], alive: list[torch.Tensor], blocks: Sequence[str]
) -> dict[str, Any]:
    """Bytes of a training step, by running one."""
    parameters = [p for p in model.parameters() if p.requires_grad and p.is_floating_point()]
    optimizer = torch.optim.AdamW(parameters, foreach=True)
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()  # the moments exist from the first step on
    optimizer.zero_grad(set_to_none=True)
    moments = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    moments = [x for x in moments if x.ndim]

    # Two runs, since looking at what is saved keeps it alive.
    saved = _saved_bytes(model, arguments, blocks)
    trace = _Trace(model, blocks)
    was_training = model.training
    model.train()
    peaks: dict[str, int] = {}
    try:
        with _FusedAttention(trace), _LiveMemory([*alive, *moments]) as memory:
            loss = _main_tensor(model(**arguments)).float().square().mean()
            peaks["forward"] = memory.reset_peak()
            loss.backward()
            peaks["backward"] = memory.reset_peak()
            optimizer.step()
            peaks["optimizer"] = memory.reset_peak()
    finally:
        model.train(was_training)
    gradients = [p.grad for p in parameters if p.grad is not None]
    result = {
        "saved": saved,
        "activations": sum(saved.values()),
        "gradients": sum(storage_bytes(gradients).values()),
        "optimizer": sum(storage_bytes(moments).values()),
        "peak": max(peaks.values()),
        "peak_in": max(peaks, key=peaks.get),
    }
    optimizer.zero_grad(set_to_none=True)
    return result


def _saved_bytes(model: ModelMixin, arguments: dict[str, Any], blocks: Sequence[str]) -> dict[str, int]:
    """Bytes of each block that a forward pass in training mode keeps for the backward pass."""
    known = set(storage_bytes(list(model.parameters())))
    saved: dict[str, int] = {}
    kept: list[torch.UntypedStorage] = []
    trace = _Trace(model, blocks)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known and tensor.device.type == "meta":
            known.add(storage._cdata)
            kept.append(storage)  # its address is its identity
            saved[trace.block] = saved.get(trace.block, 0) + storage.nbytes()
        return tensor

    was_training = model.training
    model.train()
    try:
        with trace, _FusedAttention(trace), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            _main_tensor(model(**arguments))
    finally:
        model.train(was_training)
    return saved


def _receptive_field(
    model: ModelMixin, arguments: dict[str, Any], image: torch.Tensor, grid: Size, names: Sequence[str]
) -> tuple[ReceptiveField, dict[tuple[str, str], int], set[str], dict[str, Size]]:
    """Receptive field of the output and of every block, and how many tensors blocks read of each other."""
    flow, centre, blocks = _footprints(model, arguments, image, grid, names)
    edges = {edge: len(serials) for edge, serials in flow.edges.items()}
    if centre is None:
        return ReceptiveField((0, 0), (0, 0)), edges, flow.whole, blocks
    if not _touches(centre, grid):
        return ReceptiveField(centre.size, centre.size), edges, flow.whole, blocks
    # Larger images show what lies beyond, or that it grows with them.
    for factor in (4, 16):
        larger = (grid[0] * factor, grid[1] * factor)
        try:
            if image.ndim != 4:
                raise ValueError("tokens have positions of their own")
            big = image.new_zeros(*image.shape[:2], *larger)
            given = {key: big if value is image else value for key, value in arguments.items()}
            _, beyond, _ = _footprints(model, given, big, larger, ())
        except (ValueError, RuntimeError, AssertionError, IndexError):
            return ReceptiveField(None, centre.size, exact=False), edges, flow.whole, blocks
        if not _touches(beyond, larger):
            return ReceptiveField(beyond.size, centre.size), edges, flow.whole, blocks
        if flow.attended:
            break  # it grows with the image, where convolutions alone reach its border by chance
    return ReceptiveField(None, centre.size), edges, flow.whole, blocks


def _touches(rectangle: Rectangle, grid: Size) -> bool:
    return (
        rectangle.top == 0 or rectangle.left == 0 or rectangle.bottom == grid[0] - 1 or rectangle.right == grid[1] - 1
    )


def _footprints(
    model: ModelMixin, arguments: dict[str, Any], image: torch.Tensor, grid: Size, names: Sequence[str]
) -> tuple[_Flow, Rectangle | None, dict[str, Size]]:
    trace = _Trace(model, names)
    blocks: dict[str, Size] = {}
    chosen = set(names)

    def look(name: str, module: nn.Module, given: tuple, output: torch.Tensor | None) -> None:
        if output is None:
            return
        if "Norm" in type(module).__name__:
            leaves = [leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)]
            flow.take_positions(output, [leaf for leaf in leaves if leaf.shape == output.shape])
        if name in chosen:
            rectangle = flow.centre(output, _resolution(output.shape, grid))
            if rectangle is not None:
                blocks[name] = rectangle.size

    trace.on_output = look
    flow = _Flow(trace, image, grid)
    with torch.no_grad(), trace, _FusedAttention(trace), flow:
        output = _main_tensor(model(**arguments))
    return flow, flow.centre(output, _resolution(output.shape, grid)), blocks


def _list_of(block: str) -> str | None:
    """Name of the list of blocks that a block is in."""
    return next((word for word in block.split(".") if word in BLOCK_LISTS or word == "mid_block"), None)


def _kind(block: str, shape: torch.Size | None, is_before: bool, is_between: bool) -> str:
    """Kind of a block that runs before all that are in lists, or between the last way down and the first up."""
    found = _list_of(block)
    if found is not None:
        return {"down_blocks": "down", "mid_block": "mid", "up_blocks": "up"}.get(found, "block")
    if shape is not None and len(shape) == 2 and is_before or re.search(r"time|temb|label|class_emb", block):
        return "embedding"
    return "mid" if is_between else "in" if is_before else "out"


def _working_shape(block: str, outputs: dict[str, torch.Size]) -> torch.Size | None:
    """Shape of the first image or sequence that a layer of the block returns."""
    for name, shape in outputs.items():
        if (name == block or name.startswith(f"{block}.")) and len(shape) in (3, 4):
            return shape
    return outputs.get(block)


def _resolution(shape: torch.Size | None, grid: Size) -> Size | None:
    if shape is None:
        return None
    if len(shape) == 4:
        return int(shape[2]), int(shape[3])
    return _token_grid(shape[1], grid) if len(shape) == 3 else None


def _token_grid(tokens: int, grid: Size) -> Size | None:
    """Height and width of the patches that so many tokens can be: the image's, divided by one factor."""
    height, width = grid
    for factor in range(1, min(grid) + 1):
        if height % factor == 0 and width % factor == 0 and height * width == tokens * factor**2:
            return height // factor, width // factor
    return None


def _attention_layers(
    model: nn.Module, trace: _Trace, calls: list[tuple[str, str, torch.Size, torch.Size]], grid: Size
) -> dict[str, list[Attention]]:
    """Attention layers of each block: those that were called, and modules that compute attention in another way."""
    modules = dict(model.named_modules())
    layers: dict[str, list[Attention]] = {}
    seen = set()
    for block, name, query, key in calls:
        seen.update(_prefixes(name))
        queries, keys = int(query[2]), int(key[2])
        declared = getattr(modules.get(name), "is_cross_attention", None)
        is_cross = queries != keys if queries > 1 else False
        kind = "pool" if queries == 1 and keys > 1 else "cross" if is_cross or declared is True else "self"
        resolution = _token_grid(queries, grid) if queries > 1 else None
        resolution = resolution or (_token_grid(keys, grid) or _token_grid(keys - 1, grid) if kind == "pool" else None)
        layers.setdefault(block, []).append(Attention(int(query[1]), int(query[3]), queries, keys, kind, resolution))
    for name, module in modules.items():
        heads = next((h for word in ("heads", "num_heads") if isinstance(h := getattr(module, word, None), int)), None)
        is_attention = heads and "attention" in type(module).__name__.lower()
        if not is_attention or name in seen or name not in trace.outputs:
            continue
        if any(inner in seen for inner in (f"{name}.{child}" for child, _ in module.named_modules() if child)):
            continue
        seen.update(_prefixes(name))
        shape = trace.outputs[name]
        tokens = int(math.prod(shape[2:]) if len(shape) == 4 else shape[1])
        channels = int(shape[1] if len(shape) == 4 else shape[-1])
        kind = "cross" if getattr(module, "is_cross_attention", False) else "self"
        layers.setdefault(trace.block_of[name], []).append(
            Attention(heads, channels // heads, tokens, tokens, kind, _token_grid(tokens, grid))
        )
    return layers


# Precision


def _kept_in_float32(model: ModelMixin) -> tuple[str, ...]:
    kept = getattr(model, "_keep_in_fp32_modules", None) or ()
    return (kept,) if isinstance(kept, str) else tuple(kept)


def _cast(model: ModelMixin, dtype: torch.dtype, kept: Sequence[str]) -> None:
    """As `from_pretrained(torch_dtype=dtype)` does."""
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        if parameter.is_floating_point():
            words = name.split(".")
            target = torch.float32 if any(word in words for word in kept) else dtype
            parameter.data = parameter.data.to(target)


def _precision(model: ModelMixin, dtype: str, kept: tuple[str, ...], size: int | None) -> Precision:
    not_cast = tuple(getattr(model, "_skip_layerwise_casting_patterns", None) or ())
    parameters = list(model.named_parameters())
    computed: list[str] = []
    half = torch.float16 if dtype == "float32" else DTYPES[dtype]
    _cast(model, half, kept)
    trace = _Trace(model, ())
    try:
        arguments, _, _ = example_inputs(model, size, 1, half)
        with torch.no_grad(), trace, _FusedAttention(trace):
            model(**arguments)
        computed = [name for name, found in trace.dtypes.items() if found == torch.float32 and name]
        # The outermost names say it all.
        computed = [name for name in computed if not any(outer in computed for outer in list(_prefixes(name))[1:])]
    except (RuntimeError, ValueError):
        pass  # not every network runs in half precision
    return Precision(
        dtype=dtype,
        kept_in_float32=kept,
        kept_in_float32_parameters=sum(p.numel() for n, p in parameters if set(n.split(".")) & set(kept)),
        not_cast=not_cast,
        not_cast_parameters=sum(p.numel() for n, p in parameters if any(re.search(w, n) for w in not_cast)),
        computed_in_float32=tuple(computed),
    )


# The effective receptive field


def _measure_effective(source: Source, network: Network, grid: Size, effective: str) -> dict[str, Any]:
    if effective == "never":
        return {"effective_of": "not asked for"}
    if len(network.input_shape) != 4:
        return {"effective_of": "not measured: its input is no image"}
    if effective == "auto" and (network.parameters > EFFECTIVE_PARAMETERS or network.flops > EFFECTIVE_FLOPS):
        return {"effective_of": 'not measured: a large network (`effective` "always" does it)'}
    generator = torch.Generator().manual_seed(0)
    weights = "weights of the folder"
    if source.folder is not None and any(source.folder.glob("*.safetensors")):
        try:
            check_folder(source.folder)
            model = source.model_class.from_pretrained(source.folder, use_safetensors=True)
        except (OSError, RuntimeError, ValueError) as error:
            return {"effective_of": f"not measured: the weights do not load ({str(error).splitlines()[0][:120]})"}
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = build(source, "cpu")
        fill_zero_layers(model, generator)
        weights = "random weights, zero-initialised layers drawn anew"
    model = model.float().eval().requires_grad_(False)
    if network.parameters > EFFECTIVE_PARAMETERS and getattr(model, "_supports_gradient_checkpointing", False):
        model.enable_gradient_checkpointing()
    arguments, image, _ = example_inputs(model, grid[0])
    samples = int(min(max(EFFECTIVE_FLOPS / max(network.flops, 1), 1), EFFECTIVE_SAMPLES))

    def run(sample: torch.Tensor) -> torch.Tensor:
        return _main_tensor(model(**{key: sample if value is image else value for key, value in arguments.items()}))

    shape = tuple(image.shape[1:])
    try:
        size, _ = effective_receptive_field(run, shape, samples, generator)
    except ValueError as error:
        return {"effective_of": f"not measured: {error}"}
    images = f"{samples} image{'s' if samples > 1 else ''} of normal noise at timestep {TIMESTEP}"
    return {"effective": round(size, 1), "effective_of": f"{weights}, {images}"}
