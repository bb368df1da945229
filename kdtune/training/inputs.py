"""Check a run's rows and weights: they fit the models, and are the same on all processes and on resume."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from kdtune.config import factory, instantiate
from kdtune.data import Batch, Dataset
from kdtune.distributed import World, is_first_on_host, raise_on_all_ranks
from kdtune.errors import ConfigError, DataError, KDTuneError
from kdtune.log import get_logger
from kdtune.parallel import model_config
from kdtune.runs.folder import holds_run
from kdtune.runs.record import differing_values, recorded_starts
from kdtune.teachers import configured_teacher
from kdtune.tokenizers import Tokenizer, fingerprint
from kdtune.training.checks import keys_without_answers

log = get_logger(__name__)

_MODELS = (("model", "checkpointer"), ("teacher_model", "teacher_checkpointer"))
_KEY = "inputs"


def check_inputs(
    cfg: Any, tokenizer: Tokenizer, datasets: Mapping[str, Dataset | None], world: World
) -> dict[str, dict[str, Any]]:
    """Check a training run's inputs and return their fingerprints for run.json.

    Rows as for `check_data`; weights and tokenizer must be the same on all hosts. A resumed run must have the inputs that
    it was started with: fingerprints are compared with those in its run.json (see `Dataset.fingerprint`,
    `Checkpointer.fingerprint`).

    Args:
        cfg: of a recipe that trains.
        tokenizer: the run's.
        datasets: datasets by config key; None if the config has none.
        world: the processes, all of which call this.

    Raises:
        ConfigError: a key or file, which the message names, differs from that of the run being resumed, or between hosts.
        DataError: as `check_data`.
    """
    rows = check_data(cfg, datasets, world, tokenizer, prompts_alone=keys_without_answers(cfg))
    _check_sample_prompts(cfg, tokenizer)
    _check_writer(cfg)
    with raise_on_all_ranks():
        own = _files(cfg, tokenizer) if is_first_on_host() else None
    by_rank = {rank: files for rank, files in enumerate(world.gather(own)) if files is not None}
    _check_same_files(by_rank)
    found = {**by_rank[0], **rows}
    with raise_on_all_ranks():
        if world.is_main and cfg.resume_from_checkpoint:
            _check_as_recorded(Path(cfg.output_dir), found)
    return {_KEY: found}


def _files(cfg: Any, tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """Return the fingerprints of the tokenizer, the models and a teacher read from files, by config key."""
    nodes = {key: instantiate(getattr(cfg, key, None)) for _, key in _MODELS}
    nodes["teacher"] = configured_teacher(cfg)
    own = {"teacher_tokenizer": fingerprint(tokenizer.pair.teacher)} if tokenizer.pair else {}
    return {"tokenizer": fingerprint(tokenizer), **own, **{key: one.fingerprint() for key, one in nodes.items() if one}}


def _check_same_files(by_rank: Mapping[int, Mapping[str, Any]]) -> None:
    for rank, files in by_rank.items():
        for key, found in files.items():
            if different := differing_values(key, by_rank[0][key], found):
                name, first, other = different[0].texts
                raise ConfigError(
                    f"{name}: the hosts have different files under the same path (rank 0: {first}; rank {rank}: {other}); "
                    "copy them from one host to the others, or read them from a disk that all share"
                )


def check_data(
    cfg: Any,
    datasets: Mapping[str, Dataset | None],
    world: World,
    tokenizer: Tokenizer,
    *,
    prompts_alone: Collection[str] = (),
) -> dict[str, str]:
    """Return the datasets' fingerprints, after checking that all processes have the same rows and that the models fit them.

    cfg, datasets, world and tokenizer as for `check_inputs`. A teacher with a tokenizer of its own must fit its own tokens.
    `prompts_alone` are the keys of data whose answers a model writes.

    Raises:
        ConfigError: the lengths of the examples are unknown, and the tokenizer's max_seq_len is not set; or a dataset has no answers.
        DataError: the processes have different rows, or an example is longer than a model's context.
    """
    given = {key: dataset for key, dataset in datasets.items() if dataset is not None}
    for key, dataset in given.items():
        if dataset.is_prompts and key not in prompts_alone:
            from kdtune.data.first_row import answers_needed  # most runs do without it

            raise ConfigError(answers_needed(key, getattr(cfg, key)["_component_"]))
    rows = {key: dataset.fingerprint() for key, dataset in given.items()}
    everywhere = world.gather(rows)
    for key in rows:
        _check_same_rows(key, [one[key] for one in everywhere])
    lengths = {key: _room(dataset) for key, dataset in given.items()}
    if tokenizer.pair is None:
        check_lengths(cfg, lengths)
    else:
        of_teacher = {key: dataset.teacher_lengths for key, dataset in given.items()}
        check_lengths(cfg, lengths, prefix="")
        check_lengths(cfg, of_teacher, prefix="teacher_", limit=tokenizer.pair.teacher.max_seq_len)
    return rows


def _room(dataset: Dataset) -> Sequence[int] | None:
    """Return the tokens that each example takes of a context: after a prompt alone, at least one of an answer."""
    lengths = dataset.lengths
    return [length + 1 for length in lengths] if dataset.is_prompts and lengths is not None else lengths


def _check_same_rows(key: str, by_rank: Sequence[str]) -> None:
    if len(set(by_rank)) == 1:
        return
    ranks = {rows: [rank for rank, one in enumerate(by_rank) if one == rows] for rows in dict.fromkeys(by_rank)}
    listed = "; ".join(f"rank {', '.join(map(str, ranks[rows]))}: {rows}" for rows in ranks)
    raise DataError(
        f"{key}: the processes have different rows ({listed}); each must be given all rows, in the same order, and takes its "
        "share of them itself: read the same files on every process and host, and nothing that depends on the rank"
    )


def check_lengths(
    cfg: Any,
    lengths: Mapping[str, Sequence[int] | None],
    *,
    prefix: Literal["", "teacher_"] | None = None,
    limit: int | None = None,
) -> None:
    """Raise if an example is longer than any model's context; a resumed run, started with it, logs it instead.

    Args:
        cfg: of any recipe; no weights are read.
        lengths: numbers of tokens of the examples, by config key; None if unknown before they are read.
        prefix: of the keys of the one model whose tokens these are, where the teacher has a tokenizer of its own; None: all models.
        limit: max_seq_len of that tokenizer of the teacher.

    Raises:
        ConfigError: they are unknown, and the tokenizer's max_seq_len allows longer ones, or is not set.
        DataError: one is longer.
    """
    contexts = _contexts(cfg, prefix)
    if not contexts:  # a teacher of one's own
        return
    key_of_model, context = min(contexts.items(), key=lambda one: one[1])
    setting = f"{prefix or ''}tokenizer.max_seq_len"
    limit = limit if prefix else cfg.tokenizer.get("max_seq_len")
    advice = f"set {setting}={context}, which cuts longer examples"
    if prefix and not cfg.teacher_tokenizer and cfg.teacher_checkpointer:  # it is the one in that folder
        node = f"_component_: kdtune.tokenizers.load, path: {instantiate(cfg.teacher_checkpointer).checkpoint_dir}"
        advice = f'set "teacher_tokenizer={{{node}, max_seq_len: {context}}}", which cuts longer examples'
    whose = " in the teacher's own tokens" if prefix else ""
    for key, found in lengths.items():
        error: KDTuneError
        if found is None:
            if limit is not None and limit <= context:
                continue
            error = ConfigError(
                f"{key}: is read as it is needed, so how long its examples are is not known, and {setting} is "
                f"{'not set' if limit is None else limit}; {key_of_model} has a context of {context} tokens: {advice}"
            )
        else:
            num_longer, longest = sum(length > context for length in found), max(found, default=0)
            if not num_longer:
                continue
            error = DataError(
                f"{key}: {num_longer} of {len(found)} examples are longer{whose} than the {context} tokens that {key_of_model} "
                f"has for its context (the longest has {longest}); {advice}, or leave them out by filter_fn"
            )
        if not (getattr(cfg, "resume_from_checkpoint", False) and holds_run(Path(cfg.output_dir))):
            raise error
        log.warning("%s (the run was started with them and keeps them)", error)


def check_context(cfg: Any, key: str) -> None:
    """Raise ConfigError if the token count under a config key, such as max_seq_length, exceeds a model's context."""
    key_of_model, context = min(_contexts(cfg).items(), key=lambda one: one[1])
    if getattr(cfg, key) is not None and getattr(cfg, key) > context:
        raise ConfigError(
            f"{key}={getattr(cfg, key)}: {key_of_model} has a context of {context} tokens; set it to at most {context}"
        )


def context_note(cfg: Any) -> str | None:
    """Return a warning if tokenizer.max_seq_len allows examples longer than a model's context; None if not, or if unknown.

    Whether there are such examples is known only when the data is read.
    """
    node = getattr(cfg, "tokenizer", None)
    limit = node.get("max_seq_len") if isinstance(node, dict) else None
    if limit is None:
        return None
    try:
        # A teacher with a tokenizer of its own has a limit of its own.
        is_cross = getattr(instantiate(getattr(cfg, "kd_loss", None)), "is_cross_tokenizer", False)
        contexts = _contexts(cfg, "" if is_cross else None)
    except KDTuneError:  # the checkpoint is not there yet
        return None
    listed = ", ".join(f"{key}: {context}" for key, context in contexts.items() if context < limit)
    if not listed:
        return None
    return (
        f"tokenizer.max_seq_len={limit} is above a model's context ({listed} tokens); examples longer than that are refused "
        "when the data is read"
    )


def _contexts(cfg: Any, prefix: str | None = None) -> dict[str, int]:
    """Return the context length of each model of the config, or of the one with a prefix, by the key that determines it.

    A builder's own max_seq_len in the config takes precedence over the checkpoint's.
    """
    found = {}
    for builder, weights in _MODELS:
        if prefix is not None and builder != f"{prefix}model":
            continue
        node, checkpointer = getattr(cfg, builder, None), getattr(cfg, weights, None)
        if node is not None and (checkpointer is None or "max_seq_len" in node):
            found[builder] = model_config(factory(node), None).max_seq_len
        elif checkpointer is not None:
            source = instantiate(checkpointer)
            found[f"{weights}={source.checkpoint_dir}"] = source.model_config().max_seq_len
    return found


def shortest_context(cfg: Any, model: Any) -> int:
    """Return the shortest context of the models of a config `cfg`, in tokens, and of a built `model`, one of them."""
    return min([model.config.max_seq_len, *_contexts(cfg).values()])


def example_lengths(batches: Sequence[Batch]) -> list[int]:
    """Return the number of tokens of each example of some batches."""
    return [length for batch in batches for length in batch.lengths]


def _check_sample_prompts(cfg: Any, tokenizer: Tokenizer) -> None:
    contexts = _contexts(cfg)
    for number, prompt in enumerate(cfg.sample_prompts, 1):
        for key, context in contexts.items():
            own = tokenizer.pair.teacher if tokenizer.pair and key.startswith("teacher") else tokenizer
            ids, _ = own.tokenize_messages([{"role": "user", "content": prompt}], add_generation_prompt=True)
            if len(ids) >= context:
                raise DataError(
                    f"sample_prompts: prompt {number} has {len(ids)} tokens, which leaves no room for an answer in the {context} "
                    f"that {key} has for its context; shorten it"
                )


def _check_writer(cfg: Any) -> None:
    """Raise ConfigError if what writes the student's text in place of kdtune's decoder could draw ids that the teacher does not have."""
    rollouts = instantiate(getattr(cfg, "rollouts", None))
    if getattr(rollouts, "writer", None) is None:
        return
    from kdtune.rollouts.checks import check_writer_ids  # few runs have one

    models = [(getattr(cfg, builder), instantiate(getattr(cfg, weights))) for builder, weights in _MODELS]
    if (None, None) not in models:  # else a teacher of one's own, whose ids are known when it is built
        check_writer_ids(
            rollouts, *(model_config(node and factory(node), weights).vocab_size for node, weights in models)
        )


def _check_as_recorded(output_dir: Path, now: Mapping[str, Any]) -> None:
    """Compare the inputs with those that the run in the folder was started with."""
    now = json.loads(json.dumps(now))  # as they come back from the file
    starts = recorded_starts(output_dir)
    before = next((start[_KEY] for start in reversed(starts) if _KEY in start), None)
    if before is None:
        if starts:
            log.info(
                "%s: was started by a version that kept no fingerprints: whether rows and weights are still the same is "
                "not checked",
                output_dir,
            )
        return
    held_out = differing_values("dataset_val", before.get("dataset_val"), now.get("dataset_val"))
    if held_out:
        log.warning(
            "%s; its values from here on, and best_metric, are not comparable with those before",
            "; ".join(map(str, held_out)),
        )
    lines = [
        line
        for key in now
        if key != "dataset_val"
        for line in differing_values(key, before.get(key), _known(key, before, now))
    ]
    if lines:
        listed = "\n".join(f"  {line}" for line in lines)
        raise ConfigError(
            "the run in output_dir was started with other rows, weights or another tokenizer under the same paths; a resumed "
            f"run keeps them:\n{listed}\nput them back, or choose another output_dir for a new run"
        )


def _known(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> Any:
    """Drop model settings that the version which started the run did not record."""
    found, old = now[key], before.get(key)
    if not (isinstance(found, dict) and isinstance(old, dict)):
        return found
    if key.endswith("tokenizer"):
        return {name: value for name, value in found.items() if name in old}
    if "config" not in found:
        return found
    known = old.get("config", {})
    return {**found, "config": {name: value for name, value in found["config"].items() if name in known}}
