"""Tensors stored in files, and how to fill a model with them one at a time."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn

from kdtune.distributed import is_sharded, local_slices, row_norms, to_local
from kdtune.errors import CheckpointError
from kdtune.models import LoRALinear, Transformer, TransformerConfig, adapted_linears, family_of, weight_shapes
from kdtune.models.lora import draw_a_
from kdtune.models.nf4 import dequantized, fill_rows, quantize_nf4
from kdtune.models.quantization import linear_quantizer, target_linears
from kdtune.tensor_types import is_dtensor

_TIED = ("tok_embeddings.weight", "output.weight")


@dataclass(frozen=True)
class LazyTensor:
    """One tensor of a checkpoint file, unread."""

    file: Path
    name: str
    """Its name in the file."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    """The dtype that reading gives (float32 for quantized formats)."""
    pieces: Callable[[], Iterator[Tensor]]
    """Read the tensor as consecutive pieces along dimension 0, so that a large one is never in memory twice."""
    part: Callable[[tuple[slice, ...]], Tensor] | None = None
    """Read only a region of the tensor, if the format can."""

    def read(self) -> Tensor:
        """Read the full tensor."""
        found = list(self.pieces())
        return found[0] if len(found) == 1 else torch.cat(found)

    def region(self, region: tuple[slice, ...]) -> "LazyTensor":
        """Return a region of the tensor, unread; its slices have a start and a stop."""
        shape = tuple(part.stop - part.start for part in region)
        return replace(
            self,
            shape=shape,
            pieces=partial(self._pieces_of, region),
            part=partial(self._part_of, region) if self.part else None,
        )

    def _pieces_of(self, region: tuple[slice, ...]) -> Iterator[Tensor]:
        yield self.part(region) if self.part else self.read()[region]

    def _part_of(self, region: tuple[slice, ...], inner: tuple[slice, ...]) -> Tensor:
        assert self.part is not None
        return self.part(
            tuple(
                slice(outer.start + one.start, outer.start + one.stop) for outer, one in zip(region, inner, strict=True)
            )
        )

    def blocks(self, rows: Sequence[int]) -> "list[LazyTensor]":
        """Return the blocks of so many rows each that the tensor is, one below the other; CheckpointError if it has other rows."""
        if not self.shape or self.shape[0] != sum(rows):
            raise CheckpointError(
                f"{self}: shape {list(self.shape)} found, {' + '.join(map(str, rows))} rows expected; the weights and the config do not "
                "belong together: download both again"
            )
        rest = tuple(slice(0, size) for size in self.shape[1:])
        return [
            self.region((slice(end - count, end), *rest)) for count, end in zip(rows, accumulate(rows), strict=True)
        ]

    def fill(self, target: Tensor) -> None:
        """Copy it into `target`, converted; for a DTensor, only this process's shard is read if the format allows."""
        shard = to_local(target)
        if shard is not target:
            region = local_slices(target)
            if shard.numel():
                shard.copy_(self.part(region) if self.part else self.read()[region])
            return
        row = 0
        for piece in self.pieces():
            target[row : row + len(piece)].copy_(piece)
            row += len(piece)
        assert row == len(target), f"{self} gave {row} rows of {len(target)}"

    def __str__(self) -> str:
        return f"{self.file}: tensor {self.name!r}"


@dataclass(frozen=True)
class LazyModel:
    """A model stored in files, unread."""

    config: TransformerConfig
    tensors: Mapping[str, LazyTensor]
    """Tensors by kdtune's names, rows in kdtune's order."""
    name_in_file: Callable[[str], str]
    """Maps one of kdtune's names to the name in the files."""
    skipped: Mapping[str, int] = field(default_factory=dict)
    """Numbers of tensors of parts that are no text model's, by the part's name in the files."""


def stored_dtype(tensors: Mapping[str, LazyTensor]) -> torch.dtype:
    """Return the dtype in which most weights are stored, counted in elements."""
    counts: Counter[torch.dtype] = Counter()
    for stored in tensors.values():
        counts[stored.dtype] += torch.Size(stored.shape).numel()
    if not counts:
        raise CheckpointError("the checkpoint holds no tensors: download it again")
    return counts.most_common(1)[0][0]


def fill_model(
    model: Transformer,
    stored: LazyModel,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str,
    quantization: str | None = None,
    merge: Callable[[str, Tensor], Tensor] | None = None,
) -> Transformer:
    """Fill `model` (allocated here if it is on the meta device) in place on `device` in `dtype` and return it.

    A sharded model already has its dtype; every process reads and holds only its own shards.

    The tensors are checked against the model before any is read, then read, converted and copied one by one, so that
    about one copy of the weights is in memory. None as dtype: as stored.

    Adapters on the model are freshly initialized from torch's seed, see `LoRALinear.set_base`. A base that they need in
    NF4 is quantized tensor by tensor.

    With `quantization`, a scheme of `kdtune.models.quantization`, so are the linears of the layers of a model that is not
    sharded: one of them at a time is in memory in `dtype`. `merge` maps its name and its weight before to the weight to quantize.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of another shape or not of floating point, or a head that
            should be tied to the embedding differs from it.
    """
    tied = model.config.tie_embeddings
    tensors = stored.tensors
    check_tensors(model.config, stored)
    dtype = dtype or stored_dtype(tensors)
    adapted = {f"{name}.weight": linear for name, linear in adapted_linears(model).items()}
    sharded = is_sharded(model.parameters())
    quantized = target_linears(model) if quantization else {}
    for linear in quantized.values():
        linear.weight = nn.Parameter(torch.empty(0, device=linear.weight.device), requires_grad=False)
    if any(parameter.is_meta for parameter in model.parameters()):
        # to_empty would allocate separate memory for it, which is then discarded.
        if tied and not sharded:
            unused = torch.empty(0, device="meta")
            model.output.weight = nn.Parameter(unused, requires_grad=model.output.weight.requires_grad)
        (model if sharded else model.to(dtype)).to_empty(device=device)
    else:
        model.to(device=device, dtype=dtype)
    if not sharded:
        model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_later = (name in adapted and adapted[name].quantize_base) or name.removesuffix(".weight") in quantized
            if name in tensors and not is_later:
                tensors[name].fill(parameter)
        if quantization:
            quantize_linear = linear_quantizer(quantization)
            for name, linear in quantized.items():
                weight = tensors[f"{name}.weight"].read().to(device, dtype)
                linear.weight = nn.Parameter(merge(name, weight) if merge else weight, requires_grad=False)
                quantize_linear(name, linear)
        for name, linear in adapted.items():
            base = tensors[name].read().to(device, dtype) if linear.quantize_base else linear.weight
            if sharded:
                _begin_adapter(linear, base)
            else:
                linear.set_base(base)
    if tied and _TIED[1] in tensors:
        _check_tied(*(tensors[name] for name in _TIED))
    return model


def check_num_layers(config: TransformerConfig, num_tensors: int, where: Path | str) -> None:
    """Raise CheckpointError if a config has more layers than there are tensors, before each gets a name."""
    if config.num_layers > num_tensors:
        raise CheckpointError(
            f"{where}: the config describes {config.num_layers} layers, the files hold {num_tensors} tensors; "
            "the weights and the config do not belong together: download both again"
        )


def check_tensors(config: TransformerConfig, stored: LazyModel) -> None:
    """Check names, shapes and dtypes of all tensors against the model of the config, without reading or building anything.

    CheckpointError if a tensor is missing, unexpected, of another shape or not of floating point.
    """
    tensors = stored.tensors
    where = next(iter(tensors.values())).file.parent if tensors else "the checkpoint"
    check_num_layers(config, len(tensors), where)
    expected = weight_shapes(config)
    if config.tie_embeddings and _TIED[1] not in tensors:
        expected.pop(_TIED[1], None)
    if missing := [name for name in expected if name not in tensors]:
        hint = ""
        if missing == [_TIED[1]]:
            family = family_of(config)
            hint = (
                f", or save it with transformers from {family.architecture} ({family.headless} has no head); a model whose head is the "
                "embedding says so in its config (tie_word_embeddings: true)"
            )
        raise CheckpointError(
            f"{where}: {_some([*dict.fromkeys(map(stored.name_in_file, missing))])} missing, shape {list(expected[missing[0]])} expected; "
            f"the files do not hold the whole model that the config describes: download it again{hint}"
        )
    if unexpected := [found for name, found in tensors.items() if name not in expected]:
        first = unexpected[0]
        raise CheckpointError(
            f"{first}: unexpected ({len(unexpected)} such), shape {list(first.shape)} found; "
            f"the config describes a model of {config.num_layers} layers without it: use the files' own config"
        )
    for name, shape in expected.items():
        found = tensors[name]
        if found.shape != shape:
            raise CheckpointError(
                f"{found}: shape {list(found.shape)} found, {list(shape)} expected (as {name!r}); "
                "the weights and the config do not belong together: download both again"
            )
        if not found.dtype.is_floating_point or found.dtype.itemsize == 1:
            raise CheckpointError(
                f"{found}: dtype {str(found.dtype).removeprefix('torch.')} found; float32, float16, bfloat16 or "
                "float64 expected: use the unquantized weights of this model"
            )


def _begin_adapter(linear: LoRALinear, base: Tensor) -> None:
    """Apply `LoRALinear.set_base` to a sharded layer: every process draws all of A, as a single one would, and keeps its shard."""
    if linear.quantize_base:
        fill_rows(to_local(linear.weight), quantize_nf4(base), local_slices(linear.weight)[0])
    whole_a = draw_a_(torch.empty(linear.lora_a.weight.shape, dtype=linear.weight.dtype, device=linear.weight.device))
    to_local(linear.lora_a.weight).copy_(whole_a[local_slices(linear.lora_a.weight)])
    to_local(linear.lora_b.weight).zero_()
    if linear.magnitude is not None:
        norms = row_norms(dequantized(linear.weight))
        is_cut = is_dtensor(linear.weight)
        to_local(linear.magnitude).copy_(norms if is_cut else norms[local_slices(linear.magnitude)])


def _check_tied(embedding: LazyTensor, head: LazyTensor) -> None:
    if not torch.equal(embedding.read(), head.read()):
        raise CheckpointError(
            f"{head}: differs from the embedding {embedding.name!r}, but the config says that the two are one "
            "(tie_word_embeddings: true); set it to false in the config to use this head"
        )


def _some(names: list[str]) -> str:
    return f"tensor {names[0]!r}" if len(names) == 1 else f"{len(names)} tensors (first: {names[0]!r})"
