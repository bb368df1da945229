"""Whether a distillation config can learn from text that a model writes."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from kdtune.config import instantiate
from kdtune.config.check import COMPONENT
from kdtune.distributed import world_size
from kdtune.errors import ConfigError, KDTuneError
from kdtune.generation import Sampling
from kdtune.models import Transformer
from kdtune.parallel.mesh import is_whole

if TYPE_CHECKING:
    from kdtune.rollouts.rollouts import Rollouts

OF_BOTH = ("mixed", "speculative")
"""Sources for which the teacher computes with the student, and what it has said is kept."""


def config_problems(rollouts: "Rollouts", cfg: Any) -> list[str]:
    """Return why a distillation config `cfg` cannot have these rollouts, one sentence each; read no weights and no rows."""
    return [
        *_loss_problems(rollouts, cfg),
        *_teacher_problems(rollouts, cfg),
        *_place_problems(rollouts, cfg),
        *_writer_problems(rollouts),
    ]


def _loss_problems(rollouts: "Rollouts", cfg: Any) -> Iterator[str]:
    sources = rollouts.policy.sources
    if cfg.kd_ratio == 0 and sources & {"student", *OF_BOTH}:
        yield "kd_ratio=0: of the student's own text only the divergence from the teacher is learned; give it a weight, or ~rollouts"
    if 0 < cfg.kd_ratio < 1 and rollouts.policy_gradient is None and not sources & {"dataset", "teacher"}:
        yield (
            f"kd_ratio={cfg.kd_ratio}: on the student's own text there is no cross entropy, and rollouts.policy has no other text; set "
            "kd_ratio=1, give a share to the data, or give rollouts.policy_gradient"
        )
    if rollouts.policy_gradient is not None and hasattr(rollouts.policy, "weights"):
        yield "rollouts.policy_gradient: is not defined for pairs of texts; ~rollouts.policy_gradient, or another rollouts.policy"
    if rollouts.policy_gradient is not None and (
        not 0 < cfg.kd_ratio < 1 or sources - {"dataset", "student", "mixed", "replay"}
    ):
        yield (
            f"rollouts.policy_gradient: needs kd_ratio between 0 and 1 (found {cfg.kd_ratio}), and of models' texts only the student's "
            f"(the policy has: {', '.join(sorted(sources))})"
        )
    try:
        kd_loss = instantiate(cfg.kd_loss)
    except KDTuneError:  # said elsewhere
        return
    if hasattr(kd_loss, "for_text") and not sources & {"student", *OF_BOTH}:
        yield "kd_loss: has a divergence for the student's own text, which rollouts.policy never has; give it a share, or the other alone"
    needs_samples = {
        "rollouts.policy_gradient": rollouts.policy_gradient is not None,
        "kd_loss": hasattr(kd_loss, "text_problem"),
    }
    for key in (key for key, is_there in needs_samples.items() if is_there):
        if rollouts.sampling == Sampling(1.0) and "speculative" not in sources:
            continue
        yield (
            f"{key}: holds for text drawn from the model's own distribution; give rollouts.temperature=1 without top_k and top_p, "
            "and no speculative text"
        )
    if getattr(kd_loss, "is_cross_tokenizer", False):
        yield "rollouts: the text of one tokenizer is not paired with that of another while it trains; choose another kd_loss, or ~rollouts"
    if "replay" in sources and not rollouts.buffer.capacity:
        yield "rollouts.buffer_size=0: the policy learns from earlier texts; give a number of them, such as 1000"
    if rollouts.buffer.capacity and "replay" not in sources:
        yield f"rollouts.buffer_size={rollouts.buffer.capacity}: the policy never learns from earlier texts; ~rollouts.buffer_size"
    if cfg.hidden_loss and rollouts.buffer.capacity and rollouts.keep_targets:
        yield "rollouts.keep_targets=true: hidden_loss compares layers, whose states are not kept; set it to false, or ~hidden_loss"
    if cfg.hidden_loss and sources & {*OF_BOTH}:
        yield "hidden_loss: of text that both models write, the states of layers are not kept; ~hidden_loss, or another rollouts.policy"
    listens = getattr(rollouts.policy, "metric", None)
    if listens and (cfg.dataset_val is None or cfg.run_val_every_n_steps is None):
        yield (
            f"rollouts.policy: goes by {listens} of the validations during the training; give dataset_val and run_val_every_n_steps, or "
            "another policy"
        )


def _teacher_problems(rollouts: "Rollouts", cfg: Any) -> Iterator[str]:
    if _has_cache(cfg.teacher):
        yield (
            "teacher: a cache knows the texts that it was captured of, not those that a model writes; give a teacher that is computed, or "
            "~rollouts"
        )
    if rollouts.policy.sources & {"teacher", *OF_BOTH} and (cfg.teacher or cfg.teacher_processes):
        key = "teacher" if cfg.teacher else "teacher_processes"
        yield f"rollouts.policy: the teacher writes only as a model in the student's processes; ~{key}, or a policy without its texts"
    if rollouts.policy.sources & {*OF_BOTH} and cfg.teacher_device:
        yield f"teacher_device={cfg.teacher_device}: both models write a text on one device; ~teacher_device, or another rollouts.policy"


def _place_problems(rollouts: "Rollouts", cfg: Any) -> Iterator[str]:
    if (cfg.parallelism or {}).get("tp", 1) > 1:
        yield "parallelism.tp: processes that share a model cannot write different texts; set 1, and dp_shard to divide it"
    layouts = [instantiate(node) for node in (cfg.parallelism, cfg.teacher_parallelism or cfg.parallelism)]
    if rollouts.policy.sources & {*OF_BOTH} and not all(is_whole(one, world_size()) for one in layouts):
        yield (
            "rollouts.policy: where both models write a text, every process needs whole ones; parallelism.dp_shard=1 "
            "parallelism.dp_replicate=-1"
        )
    if rollouts.compile and not all(is_whole(one, world_size()) for one in layouts):
        yield (
            "rollouts.compile=true: the forward of a model that processes share is not compiled; ~rollouts.compile, or "
            "parallelism.dp_shard=1 parallelism.dp_replicate=-1"
        )
    if rollouts.compile and not _compiled_writers(rollouts):
        yield "rollouts.compile=true: nothing is written that the compiled forward of one new token serves; ~rollouts.compile"
    if cfg.optimizer_in_backward and (
        hasattr(rollouts.policy, "weights") or {"replay", "teacher"} <= rollouts.policy.sources
    ):
        yield (
            "optimizer_in_backward=true, rollouts.policy: a step has micro-batches of the student's text and of the teacher's, and a "
            "weight is updated in every backward; set optimizer_in_backward=false"
        )
    nodes = cfg.dataset if isinstance(cfg.dataset, list) else [cfg.dataset]
    if any(isinstance(node, dict) and node.get("packed") for node in nodes):
        yield (
            "dataset.packed=true: batch_size would count packs of the data and texts of a model; ~dataset.packed, and "
            "tokens_per_micro_batch for micro-batches of one size"
        )


def _compiled_writers(rollouts: "Rollouts") -> frozenset[str]:
    """Return the models that write with forwards of one new token: all but those of speculative text."""
    return rollouts.writers(rollouts.policy.sources - {"speculative"})


def check_writer_ids(rollouts: "Rollouts", num_of_student: int, num_of_teacher: int) -> None:
    """Raise ConfigError if what writes in place of kdtune's decoder could draw one of the student's ids that the teacher does not have."""
    if rollouts.writer is not None and num_of_teacher < num_of_student:
        raise ConfigError(
            f"rollouts.writer: the student has {num_of_student:,} ids and the teacher {num_of_teacher:,}, and the writer would draw "
            "from all; ~rollouts.writer"
        )


def check_compiled(rollouts: "Rollouts", models: Mapping[str, Transformer | None]) -> None:
    """Raise ConfigError if `rollouts.compile` is set and one of the models, by name, that write cannot be compiled."""
    from kdtune.generation.compiled import can_compile

    for name in sorted(_compiled_writers(rollouts)) if rollouts.compile else ():
        model = models[name]
        if model is not None and not can_compile(model):
            raise ConfigError(
                f"rollouts.compile=true: the {name}'s forward is not compiled: it has quantized weights, is shared by processes, or is a "
                "model of transformers; ~rollouts.compile"
            )


def _writer_problems(rollouts: "Rollouts") -> Iterator[str]:
    if rollouts.writer is None:
        return
    if "student" not in rollouts.policy.sources:
        yield "rollouts.writer: writes the student's text, and the policy has none; ~rollouts.writer, or give the student a share"
    if both := [source for source in OF_BOTH if source in rollouts.policy.sources]:
        yield (
            f"rollouts.writer: in {both[0]} text both models compute every token, which kdtune's decoder does alone; ~rollouts.writer, or "
            "another rollouts.policy"
        )
    yield from (f"rollouts.writer: {problem}" for problem in rollouts.writer.problems())


def _has_cache(node: Any) -> bool:
    """Return whether a teacher, or one that it consists of, is a cache; one that only validates does not matter."""
    if isinstance(node, list):
        return any(map(_has_cache, node))
    if not isinstance(node, dict):
        return False
    is_one = str(node.get(COMPONENT, "")).endswith(".CachedTeacher")
    return is_one or any(_has_cache(value) for key, value in node.items() if key != "validation")
