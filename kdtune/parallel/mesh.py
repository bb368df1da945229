"""The device mesh over which a model is divided, and whether its sizes allow it: without what divides it, which is slow to import."""

import math

from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from kdtune.constants import TP_DIM
from kdtune.distributed import Parallelism, World
from kdtune.errors import ParallelismError
from kdtune.models import Transformer, TransformerConfig, adapted_linears

WHOLE_COPIES = (
    "allowed is a copy on every process: dp_shard=1 dp_replicate=-1 tp=1, without cpu_offload and param_dtype"
)


def device_mesh(model: Transformer, parallelism: Parallelism, world: World) -> DeviceMesh | None:
    """Return the mesh over which the model is sharded: the sizes of `parallelism`, with the world's timeout.

    None: every process holds all of it. So do a process without a process group, and replicas without gradients (dp_shard
    1, several processes).

    Raises:
        ConfigError: the sizes do not fit the number of processes.
        ParallelismError: they do not fit the model.
    """
    sizes = parallelism.sizes(world.size)
    if not world.has_group or (sizes[TP_DIM] == 1 and is_copy(model, parallelism, sizes["dp_shard"])):
        return None
    # Before any communication: all processes have to get this far.
    if problem := model_problem(model, parallelism, world.size):
        raise ParallelismError(f"parallelism: {problem}")
    sizes = {name: size for name, size in sizes.items() if size > 1 or name == "dp_shard"}
    mesh = init_device_mesh(world.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    if world.timeout is not None:
        # A dimension that is not all processes is a new group, which has torch's half an hour unless told otherwise.
        for name in sizes:
            dist.distributed_c10d._set_pg_timeout(world.timeout, mesh.get_group(name))
    return mesh


def is_whole(parallelism: Parallelism, num_processes: int) -> bool:
    """Return whether each of the processes holds all of a frozen model, as quantized weights must be."""
    sizes = parallelism.sizes(num_processes)
    return sizes[TP_DIM] == sizes["dp_shard"] == 1 and parallelism.is_plain


def is_copy(model: Transformer, parallelism: Parallelism, num_shards: int) -> bool:
    """Return whether FSDP has nothing to do: no shards, no gradients to sum, weights used where and as they are stored."""
    is_trained = any(parameter.requires_grad for parameter in model.parameters())
    return num_shards == 1 and not is_trained and parallelism.is_plain


def model_problem(model: Transformer, parallelism: Parallelism, num_processes: int) -> str | None:
    """Return why a model cannot be divided among this many processes by `tp` or `cpu_offload`, None if it can; no weights are needed."""
    tp = parallelism.sizes(num_processes)[TP_DIM]
    if problem := tensor_parallel_problem(model.config, tp):
        return problem
    if parallelism.cpu_offload and not isinstance(model.config, TransformerConfig):
        return (
            "cpu_offload=true: of a model that transformers computes, tables that are no weights would stay on the CPU; set it to "
            "false: dp_shard divides weights, gradients and optimizer state"
        )
    is_quantized = any(linear.quantize_base for linear in adapted_linears(model).values())
    if is_quantized and (tp > 1 or parallelism.cpu_offload):
        return (
            f"tp={tp}, cpu_offload={str(parallelism.cpu_offload).lower()}, with adapters of quantize_base=true (QLoRA); an NF4 "
            "base is cut by rows for FSDP alone, and stays on the device: allowed are tp=1 and cpu_offload=false; or set "
            "quantize_base=false"
        )
    return None


def tensor_parallel_problem(config: TransformerConfig, tp: int) -> str | None:
    """Return which sizes of a model `tp` does not divide, and which values of `tp` divide them; None if it divides all."""
    if tp > 1 and not isinstance(config, TransformerConfig):
        return f"tp={tp}: does not divide a model that transformers computes; allowed: 1, and dp_shard divides it"
    if tp == 1:
        return None
    sizes = {name: getattr(config, name) for name in ("num_kv_heads", "num_heads", "intermediate_dim", "vocab_size")}
    bad = ", ".join(f"{name}={size}" for name, size in sizes.items() if size % tp)
    common = math.gcd(*sizes.values())
    allowed = ", ".join(str(number) for number in range(1, common + 1) if common % number == 0)
    return f"tp={tp} does not divide {bad}; allowed for this model: {allowed}" if bad else None
