"""Checks shared by the training recipes: config problems, changes allowed on resume, and when periodic work is due."""

import json
import os
from dataclasses import fields
from typing import Any

from kdtune import data, losses, parallel, runs
from kdtune.config import factory, instantiate
from kdtune.config.check import is_ours
from kdtune.config.schema import schema_defaults
from kdtune.distributed import World, raise_on_all_ranks
from kdtune.errors import ConfigError, KDTuneError
from kdtune.log import get_logger
from kdtune.models import Transformer, has_adapters
from kdtune.training.precision import device_name_problems

log = get_logger(__name__)

# Nodes that were found to be in order: a sweep asks for the same ones hundreds of times.
_IN_ORDER: set[str] = set()

# Settings that only mean something beside another: a shipped config may be run without the other, and says so.
_NEEDS = {
    "run_val_every_n_steps": "dataset_val",
    "batch_size_val": "dataset_val",
    "sample_every_n_steps": "sample_prompts",
    "sample_max_new_tokens": "sample_prompts",
    "keep_last_n_checkpoints": "save_every_n_steps",
}

_MAX_WORKERS = 512  # processes that the largest hosts can start beside a run


def may_change(cfg: Any) -> list[str]:
    """Return the keys of a recipe's config that a resumed run may have otherwise: where it runs, what it shows, how long.

    step_to_resume checks the part of gradient_accumulation_steps and of the parallelism that must not change. Where a policy of the
    rollouts goes by the validations, their steps are kept.
    """
    kept = {"run_val_every_n_steps"} if getattr(_of_rollouts(cfg, "policy"), "metric", None) else set()
    return [field.name for field in fields(cfg) if field.metadata.get("may_change") and field.name not in kept]


def profiler_and_logger(cfg: Any, world: World) -> tuple[Any, Any]:
    """Build the config's profiler and second logger on rank 0, None elsewhere; its ConfigError is raised on all."""
    with raise_on_all_ranks():
        if not world.is_main:
            return None, None
        profiler = instantiate(cfg.profiler, optional={"output_dir": cfg.output_dir})
        return profiler, instantiate(cfg.metric_logger, optional={"log_dir": cfg.output_dir})


def range_problems(cfg: Any) -> list[str]:
    """Return which keys of any recipe's config are below their smallest value, or above the largest, one sentence each."""
    least = {
        field.name: field.metadata["at_least"] for field in fields(cfg) if field.metadata.get("at_least") is not None
    }
    found = [
        f"{key}={getattr(cfg, key)}: must be at least {number}"
        for key, number in least.items()
        if getattr(cfg, key) is not None and getattr(cfg, key) < number
    ]
    found += [
        f"{key}={getattr(cfg, key)}: must be at most {most:,}"
        for key, most in {**dict.fromkeys(least, 2**31 - 1), "num_workers": _MAX_WORKERS, "seed": 2**63 - 1}.items()
        if (getattr(cfg, key, None) or 0) > most
    ]
    return found


def loop_problems(cfg: Any) -> list[str]:
    """Return problems with a training recipe's config, one sentence each, for the keys that all of these recipes have."""
    found = range_problems(cfg)
    if cfg.num_workers < 0:
        found.append(f"num_workers={cfg.num_workers}: must be 0 (the run itself prepares its batches) or more")
    found += device_name_problems(cfg.device)
    found += device_name_problems(getattr(cfg, "teacher_device", None), "teacher_device")
    found += runs.resume_changes_problems(cfg.resume_changes, resume=cfg.resume_from_checkpoint)
    if cfg.clip_grad_norm is not None and cfg.clip_grad_norm <= 0:
        found.append(f"clip_grad_norm={cfg.clip_grad_norm}: must be above 0; null switches clipping off")
    if cfg.save_weights != "both" and cfg.adapter is None and cfg.model is None:
        found.append(
            f"save_weights={cfg.save_weights}: needs adapters, from `adapter` or a lora_ builder in `model`; give one, or ~save_weights"
        )
    if cfg.best_metric in ("val_kd_loss", "val_forward_kl", "val_agreement") and not hasattr(cfg, "kd_loss"):
        found.append(f"best_metric={cfg.best_metric}: is measured against a teacher, and this recipe has none; allowed is "
                     "val_class_loss")  # fmt: skip
    if cfg.dataset_val is None and cfg.best_metric:
        found.append(f"best_metric={cfg.best_metric}: needs dataset_val; give one, or ~best_metric")
    if os.environ.get("LOCAL_RANK", "0") == "0":
        defaults = schema_defaults(type(cfg))
        for key, needed in _NEEDS.items():
            if getattr(cfg, key) != defaults[key] and not getattr(cfg, needed):
                log.warning(f"{key}={getattr(cfg, key)}: has no effect without {needed}; to remove it too: ~{key}")
    if cfg.enable_async_checkpointing and not cfg.save_every_n_steps:
        found.append(
            "enable_async_checkpointing=true: has no effect without save_every_n_steps; give it, or ~enable_async_checkpointing"
        )
    every, val = cfg.save_every_n_steps, cfg.run_val_every_n_steps
    if cfg.best_metric and not (every and val and every % val == 0):
        found.append(
            f"best_metric={cfg.best_metric}: save_every_n_steps={every} must be a multiple of run_val_every_n_steps={val}; "
            "give both, or ~best_metric"
        )
    from kdtune.training.optim import optimizer_problems  # importing a recipe does without it

    # At most so many steps; how many there are, the data will say.
    most = cfg.epochs * cfg.max_steps_per_epoch if cfg.max_steps_per_epoch else None
    found += optimizer_problems(cfg.optimizer, cfg.lr_scheduler, most if most and most > 0 else None)
    return found + builder_problems(cfg) + data.first_row_problems(cfg, prompts_alone=keys_without_answers(cfg))


def memory_problems(cfg: Any) -> list[str]:
    """Return problems with a training recipe's options that save memory, and with pairs of them, one sentence each."""
    found = []
    which = cfg.activation_checkpointing
    if isinstance(which, int) and which < 1:
        found.append(f"activation_checkpointing={which}: every so many layers, so at least 1; or full, selective, null")
    if cfg.enable_activation_checkpointing and which not in (None, "full"):
        found.append(
            f"enable_activation_checkpointing=true, activation_checkpointing={which}: the first means full; "
            "~enable_activation_checkpointing"
        )
    if cfg.activation_offloading and cfg.compile:
        found.append(
            "activation_offloading=true, compile=true: a compiled layer chooses what it saves by itself, and has no place for the "
            "moves; set one to false"
        )
    if cfg.float8_training is not None and cfg.adapter is not None:
        found.append(
            f"float8_training={cfg.float8_training}, adapter: linears with an adapter are left out of float8; give one of them"
        )
    if cfg.float8_training is not None and (cfg.parallelism or {}).get("tp", 1) != 1:
        found.append(
            f"float8_training={cfg.float8_training}, parallelism.tp={cfg.parallelism['tp']}: linears that are cut by tensor parallelism "
            "are not converted; tp=1, or ~float8_training"
        )
    return found + _update_problems(cfg)


def _update_problems(cfg: Any) -> list[str]:
    found = []
    if cfg.optimizer_in_backward and cfg.gradient_accumulation_steps > 1:
        found.append(
            f"optimizer_in_backward=true, gradient_accumulation_steps={cfg.gradient_accumulation_steps}: a weight is updated in every "
            "backward, so gradients are not accumulated; set one to false or 1"
        )
    if cfg.optimizer_in_backward and cfg.tokens_per_micro_batch is not None:
        found.append(
            f"optimizer_in_backward=true, tokens_per_micro_batch={cfg.tokens_per_micro_batch}: it may cut a step into several "
            "micro-batches, and a weight is updated in every backward; ~tokens_per_micro_batch, or optimizer_in_backward=false"
        )
    if cfg.optimizer_in_backward and (cfg.parallelism or {}).get("cpu_offload"):
        # Before torch 2.13, FSDP2 called the update while the gradient's copy to the CPU was under way (pytorch/pytorch#180666).
        found.append(
            "optimizer_in_backward=true, parallelism.cpu_offload=true: gradients are copied to the CPU after backward; set one to false"
        )
    if cfg.optimizer_in_backward and cfg.clip_grad_norm is not None:
        found.append(
            f"optimizer_in_backward=true, clip_grad_norm={cfg.clip_grad_norm}: the norm is known only after the last gradient; "
            "~clip_grad_norm, or optimizer_in_backward=false"
        )
    if cfg.weight_update != "nearest" and cfg.dtype != "bf16":
        found.append(
            f"weight_update={cfg.weight_update}, dtype={cfg.dtype}: only bf16 weights are rounded; dtype=bf16, or ~weight_update"
        )
    if cfg.weight_update != "nearest" and (cfg.optimizer or {}).get("bf16_stochastic_round"):
        found.append(
            f"weight_update={cfg.weight_update}, optimizer.bf16_stochastic_round=true: the optimizer would be given fp32 weights, which "
            "it does not round; ~optimizer.bf16_stochastic_round, or ~weight_update"
        )
    return found


def divergence_problems(kd_loss: Any, teacher_targets: Any = None, *, is_own_text: bool = False) -> list[str]:
    """Return problems with the `kd_loss` divergence, found by calling it on a few tokens, and with its `teacher_targets`.

    is_own_text: the student has sampled the text that it is trained on; a data set's is not.
    """
    try:
        divergence = instantiate(kd_loss)
        if not is_own_text and (ask := getattr(divergence, "text_problem", None)) and (problem := ask()):
            return [f"kd_loss: {problem}"]
        losses.check_divergence(divergence)
        losses.check_targets(losses.divergence_of(divergence), instantiate(teacher_targets))
    except KDTuneError as error:
        return [str(error)]
    return []


def needs_same_template(cfg: Any) -> bool:
    """Return whether a guard of a config's rollouts, if it has any, refuses a teacher with another chat template than the data's."""
    return bool(getattr(_of_rollouts(cfg, "guards"), "same_template", False))


def _of_rollouts(cfg: Any, name: str) -> Any:
    return getattr(instantiate(getattr(cfg, "rollouts", None)), name, None)


def is_own_text(cfg: Any) -> bool:
    """Return whether all text that a distillation config `cfg` learns from is the student's own; False if it cannot be told."""
    try:
        rollouts = instantiate(cfg.rollouts)
    except KDTuneError:  # which `rollout_problems` tells
        return False
    sources: Any = getattr(getattr(rollouts, "policy", None), "sources", None)
    return bool(sources == {"student"})


def keys_without_answers(cfg: Any) -> tuple[str, ...]:
    """Return the keys of a training config whose data need no answers: "dataset" where a model writes the text of every step.

    None where a step may learn from the data's answers, or if it cannot be told.
    """
    try:
        sources: Any = getattr(_of_rollouts(cfg, "policy"), "sources", None)
    except KDTuneError:  # which `rollout_problems` tells
        return ()
    return () if sources is None or "dataset" in sources else ("dataset",)


def rollout_problems(cfg: Any) -> list[str]:
    """Return problems with the `rollouts` of a distillation config; reads no weights and no rows."""
    try:
        rollouts = instantiate(cfg.rollouts)
        if rollouts is not None and not hasattr(rollouts, "problems"):
            name = cfg.rollouts["_component_"]
            return [
                f"rollouts: {name} does not write texts; give kdtune.rollouts.Rollouts, of which {name} may be an argument"
            ]
        if rollouts is None and hasattr(instantiate(cfg.kd_loss), "for_text"):
            return [
                "kd_loss: has a divergence for the student's own text, and only the data's is learned from; give rollouts, or the other "
                "divergence alone"
            ]
        return [] if rollouts is None else list(rollouts.problems(cfg))
    except KDTuneError as error:
        return [f"rollouts: {error}"]


def check_save_weights(model: Transformer, save_weights: str) -> None:
    """Raise ConfigError if save_weights asks for an adapter and the model has none."""
    if save_weights != "both" and not has_adapters(model):
        raise ConfigError(f"save_weights={save_weights}: the model has no adapters; leave it out, or give `adapter`")


def is_due(step: int, every: int | None) -> bool:
    """Return True at every `every`-th step; never for None."""
    return every is not None and step % every == 0


def builder_problems(cfg: Any) -> list[str]:
    """Return problems with kdtune's builders in `model` and `teacher_model`, such as sizes that no model has.

    They are built without weights. cfg: of any recipe.
    """
    found = []
    for key in ("model", "teacher_model"):
        node = getattr(cfg, key, None)
        name = json.dumps(node, sort_keys=True, default=str)
        if node is None or name in _IN_ORDER or not is_ours(node):
            continue
        try:
            parallel.model_config(factory(node), None)
        except KDTuneError as error:
            found.append(f"{key}: {error}")
        else:
            _IN_ORDER.add(name)
    return found
