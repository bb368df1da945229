"""Adapters of matrices that a model's files hold as one, such as queries, keys and values: one there, here one for each.

Of a file's adapter B A each of our matrices has the rows of B that are its own, and all of A. Of ours, the file's has all of A one
below the other, and in B those of each matrix beside the columns of its own A, with zeros in the others: the same products.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kdtune.checkpoint.tensors import LazyTensor
from kdtune.distributed import full_tensor
from kdtune.errors import CheckpointError
from kdtune.models import LoRALinear, Transformer, adapted_linears, family_of
from kdtune.models.architecture import KeyMap

if TYPE_CHECKING:
    from kdtune.checkpoint.peft import StoredAdapter


def modules_beside(module: str, keys: KeyMap) -> tuple[str, ...]:
    """Return our modules whose weights are in the same matrix of the files as this one's, itself among them, in order."""
    parts = keys.parts_of(keys.whole_of(keys.from_kdtune(f"{module}.weight")))
    return tuple(keys.to_kdtune(part).removesuffix(".weight") for part in parts)


def num_joined(model: Transformer) -> dict[str, int]:
    """Return for each fused matrix, by the last part of its module's name, how many adapters of ours become its one."""
    keys, own = family_of(model.config).hf_keys, adapted_linears(model)
    counts = {}
    for module in own:
        beside = modules_beside(module, keys)
        name = keys.whole_of(keys.from_kdtune(f"{module}.weight")).removesuffix(".weight").rpartition(".")[2]
        if len(beside) > 1:
            counts[name] = sum(one in own for one in beside)
    return counts


def joined(model: Transformer) -> dict[tuple[str, str], Tensor]:
    """Return the tensors of the adapters of fused matrices, by our first module in each and the tensor's name in an adapter.

    The names are those of `LoRALinear`'s parameters. All processes of a sharded model call it together.
    """
    keys, own = family_of(model.config).hf_keys, adapted_linears(model)
    tensors: dict[tuple[str, str], Tensor] = {}
    for modules in dict.fromkeys(modules_beside(module, keys) for module in own):
        adapted = [own[module] for module in modules if module in own]
        if len(modules) == 1:
            continue
        a_RI = torch.cat([full_tensor(linear.lora_a.weight.detach()) for linear in adapted])
        rows, first = [], 0
        for module in modules:
            b_OR = a_RI.new_zeros(len(model.get_parameter(f"{module}.weight")), len(a_RI))
            if module in own:
                b_OR[:, first : first + own[module].rank] = full_tensor(own[module].lora_b.weight.detach())
                first += own[module].rank
            rows.append(b_OR)
        tensors |= {(modules[0], "lora_a.weight"): a_RI, (modules[0], "lora_b.weight"): torch.cat(rows)}
        if adapted[0].magnitude is not None:
            tensors[modules[0], "magnitude"] = torch.cat([_magnitude(model, module, own, a_RI) for module in modules])
    return tensors


def _magnitude(model: Transformer, module: str, own: Mapping[str, LoRALinear], like: Tensor) -> Tensor:
    """Return a matrix's magnitudes; of one without an adapter, the norms of its rows, with which peft leaves it as it is."""
    if module in own and (magnitude_O := own[module].magnitude) is not None:
        return full_tensor(magnitude_O.detach())
    weight_OI = full_tensor(model.get_parameter(f"{module}.weight").detach())
    return torch.linalg.vector_norm(weight_OI, dim=1, dtype=torch.promote_types(weight_OI.dtype, torch.float32)).to(
        like.dtype
    )


def fitted(adapter: "StoredAdapter", own: Mapping[str, LoRALinear], keys: KeyMap) -> dict[str, LazyTensor]:
    """Return the file's tensors for the model's own adapters: of one that `joined` wrote, of each the part that is its own.

    Raises:
        CheckpointError: The file's adapter is none of several side by side, so that no part of it is one of the model's.
    """
    tensors = dict(adapter.tensors)
    for module in adapter.scaling:
        adapted = [one for one in modules_beside(module, keys) if one in own]
        names = [f"{module}.{part}" for part in ("lora_a.weight", "lora_b.weight")]
        stored_a, stored_b = (tensors[name] for name in names)
        if module not in own:
            if stored_b.read().any():
                raise CheckpointError(_is_none_of_several(stored_b, f"it adapts {module}, which the model does not"))
            tensors = {name: stored for name, stored in tensors.items() if not name.startswith(f"{module}.")}
        elif stored_a.shape[0] != own[module].rank:
            first = adapted.index(module) * own[module].rank
            columns = slice(first, first + own[module].rank)
            others_OR = stored_b.read().clone()
            others_OR[:, columns] = 0
            if others_OR.any():
                raise CheckpointError(_is_none_of_several(stored_b, f"its rank is not {own[module].rank}"))
            tensors[names[0]] = stored_a.region((columns, slice(0, stored_a.shape[1])))
            tensors[names[1]] = stored_b.region((slice(0, stored_b.shape[0]), columns))
    return tensors


def _is_none_of_several(stored: LazyTensor, why: str) -> str:
    return (
        f"{stored}: an adapter of several matrices together, of which none has a part of its own ({why}); give the model no adapters, "
        "and this one is merged, or start from new ones"
    )
