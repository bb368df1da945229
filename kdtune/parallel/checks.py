"""Check that a config's models can be divided among the processes that were started; no weights are read."""

from typing import Any

import torch

from kdtune.checkpoint import Checkpointer
from kdtune.config import factory, instantiate
from kdtune.constants import TP_DIM
from kdtune.distributed import Parallelism, parallelism_problems, world_size
from kdtune.models import TransformerConfig, dtype_from_name, has_adapters
from kdtune.models.quantization import scheme_name, scheme_problems, shape_problems
from kdtune.parallel.mesh import WHOLE_COPIES, is_whole, model_problem
from kdtune.parallel.meta import Builder, meta_model, model_config


def problems(cfg: Any, device: torch.device | None = None, teacher_device: torch.device | None = None) -> list[str]:
    """Return why a config's models cannot be quantized, or divided among the processes that were started; read no weights.

    One sentence each. cfg: with the key parallelism, and those of model, checkpointer, adapter, quantization,
    teacher_parallelism, teacher_processes, teacher_model, teacher_checkpointer and teacher_quantization that its recipe has.
    device: of this process; None: it cannot be had, and quantization is not checked. teacher_device: of its teacher; None: the same.
    """
    parallelism: Parallelism = instantiate(cfg.parallelism)
    teacher: Parallelism | None = instantiate(getattr(cfg, "teacher_parallelism", None))
    num_teachers = getattr(cfg, "teacher_processes", 0)
    if found := parallelism_problems(parallelism, teacher, teacher_processes=num_teachers):
        return found
    teacher_name = "teacher_parallelism" if teacher else "parallelism, for the teacher"
    for name, prefix, settings, num_processes in (
        ("parallelism", "", parallelism, world_size() - num_teachers),
        (teacher_name, "teacher_", teacher or parallelism, num_teachers or world_size()),
    ):
        builder = factory(getattr(cfg, f"{prefix}model", None))
        source = instantiate(getattr(cfg, f"{prefix}checkpointer", None))
        # These alone ask for something of the model. A checkpoint that cannot be read is told elsewhere.
        is_asked = settings.sizes(num_processes)[TP_DIM] > 1 or settings.cpu_offload
        if is_asked and (builder or source) and not (source and source.problems()):
            adapter = None if prefix else factory(getattr(cfg, "adapter", None))
            model = meta_model(builder, source, adapter=adapter, dtype=torch.float32)
            if problem := model_problem(model, settings, num_processes):
                found.append(f"{name}: {problem}")
        scheme = getattr(cfg, f"{prefix}quantization", None)
        if (
            scheme
            and (of_model := (teacher_device if prefix else None) or device)
            and (builder or source)
            and not (source and source.problems())
        ):
            dtype = dtype_from_name(getattr(cfg, f"{prefix}dtype", None) or cfg.dtype)
            found += [
                f"{prefix}quantization={scheme}: {problem}"
                for problem in _quantization_problems(scheme, builder, source, of_model, dtype)
            ]
            if not is_whole(settings, num_processes):
                found.append(
                    f"{prefix}quantization={scheme}: with {name}, quantized weights are not divided; {WHOLE_COPIES}"
                )
        found += _own_decoder_problems(cfg, prefix, builder, source)
        if prefix and not is_whole(settings, num_processes):
            found += [
                f"{key}={str(value).lower()}: with {name}, the teacher is divided among the processes; {WHOLE_COPIES}"
                for key in ("teacher_device", "teacher_offload", "teacher_overlap")
                if (value := getattr(cfg, key, None))
            ]
    return found


# Options that are there for kdtune's own decoder alone, by the prefix of the model that they are of, and what to do instead.
_OF_OWN_DECODER = {
    "": {
        "compile": "",
        "float8_training": ", or dtype=bf16 for speed",
        "activation_offloading": ", or activation_checkpointing=full for memory",
    },
    "teacher_": {"compile": "", "teacher_offload": ", or teacher_device=cpu for memory"},
}


def _own_decoder_problems(cfg: Any, prefix: str, builder: Builder | None, source: Checkpointer | None) -> list[str]:
    """Return which options of a config a model that another library computes does not have."""
    given = {key: instead for key, instead in _OF_OWN_DECODER[prefix].items() if getattr(cfg, key, None)}
    if not given or not (builder or source) or (source and source.problems()):
        return []
    found = model_config(builder, source)
    if isinstance(found, TransformerConfig):
        return []
    return [
        f"{key}={str(getattr(cfg, key)).lower()}: is there for kdtune's own decoder, and transformers computes the {found.family} of "
        f"{prefix}checkpointer; ~{key}{instead}"
        for key, instead in given.items()
    ]


def _quantization_problems(
    scheme: str, builder: Builder | None, source: Checkpointer | None, device: torch.device, dtype: torch.dtype
) -> list[str]:
    if source and source.is_quantized:
        return [f"{source.checkpoint_dir} holds weights that are quantized already; leave it out"]
    found = scheme_problems(scheme, device, dtype)
    if not found and has_adapters(meta_model(builder, source, dtype=dtype)):
        found.append(
            "the builder makes adapters, and adapters are not quantized; merge them: use adapter_dir of the checkpointer"
        )
    return [
        problem.removeprefix(f"scheme={scheme_name(scheme)}: ")
        for problem in found or shape_problems(scheme, model_config(builder, source))
    ]
