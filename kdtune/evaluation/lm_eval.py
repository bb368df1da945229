"""Run tasks of lm-eval (https://github.com/EleutherAI/lm-evaluation-harness) on a kdtune model. Needs the [eval] extra."""

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from kdtune._assets import did_you_mean
from kdtune.distributed import SINGLE_PROCESS, World
from kdtune.errors import ConfigError, DataError
from kdtune.evaluation.generation_settings import read_generation_settings
from kdtune.log import get_logger
from kdtune.models import Transformer
from kdtune.paths import user_path
from kdtune.tokenizers import Tokenizer

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

log = get_logger(__name__)

# Draws for the standard error of metrics that have no formula for it (such as f1); acc and the like have one.
_BOOTSTRAP_ITERS = 1000
_SPLIT_KEYS = ("test_split", "validation_split", "training_split", "fewshot_split")


def missing_extra(key: str) -> str | None:
    """Return why a config key cannot be used if lm-eval is not installed; None if it is."""
    if all(importlib.util.find_spec(package) for package in ("lm_eval", "rouge_score")):
        return None
    return f"{key}: needs lm-eval, which is not installed; run pip install 'lm-eval>=0.4.13', or leave {key} out"


def task_problems(names: Sequence[str], include_path: str | None) -> list[str]:
    """Return why the tasks cannot be found: the extra, the folder, names; reads no dataset and no weights."""
    if not names:
        return []
    if problem := missing_extra("tasks"):
        return [problem]
    if include_path is not None and not user_path(include_path).is_dir():
        return [f"include_path={include_path}: no such folder; give one that holds lm-eval task files (*.yaml)"]
    manager = _manager_of(tuple(names), include_path)
    where = f"{include_path} and lm-eval's own tasks" if include_path else "lm-eval's own tasks"
    return [
        f"tasks: {name!r} is not a task, group or tag; looked in {where}{did_you_mean(name, manager.all_tasks)}"
        for name in names
        if not _is_known(name, manager)
    ]


def _is_known(name: str, manager: "TaskManager") -> bool:
    return name in manager.task_index or (name.endswith((".yaml", ".yml")) and user_path(name).is_file())


def _manager_of(names: tuple[str, ...], include_path: str | None) -> "TaskManager":
    """Return lm-eval's task index; its own 14,000 tasks take seconds to read and are skipped if include_path has all names."""
    path = None if include_path is None else str(user_path(include_path))
    local = _manager(path, False)
    return local if all(_is_known(name, local) for name in names) else _manager(path, True)


@cache
def _manager(include_path: str | None, include_defaults: bool) -> "TaskManager":
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=include_defaults)


def load_tasks(names: Sequence[str], include_path: str | None = None, *, num_fewshot: int | None = None) -> list[Any]:
    """Load lm-eval's task and group objects with their documents, ready for `evaluate_tasks`. Reads no weights.

    names: names of tasks, groups, tags or task files. include_path: a folder of task files that is searched first; None: only
    lm-eval's own. num_fewshot: solved examples before each question; None: as each task says.

    Raises:
        ConfigError: a name is unknown, or a task needs something that is not supported here.
        DataError: a dataset or split is missing, empty or unreadable; the message names task and split.
    """
    if problems := task_problems(names, include_path):
        raise ConfigError("\n".join(problems))
    manager = _manager_of(tuple(names), include_path)
    specs: dict[str, Any] = {}
    for name in dict.fromkeys(names):
        loaded = _load(name, manager)
        groups = loaded.get("groups", {})
        inner = {child for group in groups.values() for child in group.child_names}
        specs |= {key: group for key, group in groups.items() if key not in inner}
        grouped = {task.task_name for group in groups.values() for task in group.get_all_tasks()}
        specs |= {key: task for key, task in loaded["tasks"].items() if key not in grouped}
        for task_name, task in loaded["tasks"].items():
            _check_task(task_name, task, num_fewshot)
    return list(specs.values())


def _load(name: str, manager: "TaskManager") -> Any:
    entry = manager.task_index.get(name)
    document: Mapping[str, Any] = (entry.cfg if entry else None) or {}
    path = document.get("dataset_path")
    files = (document.get("dataset_kwargs") or {}).get("data_files")
    dataset = f"its dataset {path}{f' ({files})' if files else ''}"
    try:
        return manager.load([str(user_path(name)) if name.startswith("~") else name])
    except KeyError as error:
        split = str(error.args[0]) if error.args else ""
        key = next((key for key in _SPLIT_KEYS if document.get(key) == split), None)
        if key is None:
            raise DataError(f"tasks: {name}: {dataset} lacks {split!r}; check the task file") from error
        raise DataError(
            f"tasks: {name}: needs the split {split!r} ({key}), which {dataset} does not have; "
            "name another split in the task file, or give the dataset that split"
        ) from error
    except (IndexError, StopIteration) as error:
        raise DataError(f"tasks: {name}: {dataset} has no documents; at least 1 is needed") from error
    # A task file may name any dataset and call any function: whatever fails in it is the user's to read.
    except Exception as error:
        raise DataError(f"tasks: {name}: cannot be loaded: {_reason(error)}{_offline_advice(error)}") from error


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def _offline_advice(error: Exception) -> str:
    import datasets
    import huggingface_hub.constants

    if huggingface_hub.constants.HF_HUB_OFFLINE or isinstance(error, ConnectionError):
        return (
            "; the hub cannot be reached (HF_HUB_OFFLINE is set, or there is no network): go online, or give include_path, "
            "a folder with a task file that reads local data"
        )
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return "; check the name, and HF_TOKEN where the dataset is gated"
    return ""


def _check_task(name: str, task: Any, num_fewshot: int | None) -> None:
    """Raise ConfigError or DataError for problems that would otherwise appear only after the weights are read."""
    if getattr(task, "UNSAFE_CODE", False):
        raise ConfigError(
            f"tasks: {name}: runs code that the model writes; this recipe does not do that, choose another task"
        )
    if getattr(task, "MULTIMODAL", False):
        raise ConfigError(f"tasks: {name}: needs a model that reads images or sound; choose a task on text")
    if len(task.eval_docs) == 0:
        raise DataError(f"tasks: {name}: its dataset has no documents; at least 1 is needed")
    if task.get_config("output_type") == "generate_until":
        try:
            read_generation_settings(task.get_config("generation_kwargs") or {})
        except ConfigError as error:
            raise ConfigError(f"tasks: {name}: {error}") from error
    fixed = task.get_config("num_fewshot")
    wanted = fixed if fixed == 0 or num_fewshot is None else num_fewshot
    if num_fewshot and fixed == 0:
        log.warning("tasks: %s: its file fixes num_fewshot at 0; num_fewshot=%d is not used for it", name, num_fewshot)
    if wanted:
        examples = list(task.fewshot_docs() or [])
        if len(examples) <= wanted:
            raise DataError(
                f"tasks: {name}: num_fewshot={wanted} needs more than {wanted} examples to choose from, its dataset has "
                f"{len(examples)}; take fewer"
            )


def evaluate_tasks(
    model: Transformer,
    tokenizer: Tokenizer,
    tasks: list[Any],
    *,
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    apply_chat_template: bool = False,
    seed: int = 1234,
    log_samples: bool = False,
    world: World = SINGLE_PROCESS,
) -> dict[str, Any]:
    """Return lm-eval's results document: `results`, `n-shot`, `versions`, `configs` and, with log_samples, `samples`.

    Only rank 0 gets it; other processes get an empty one.

    Args:
        model: on any device.
        tokenizer: the model's own.
        tasks: from `load_tasks`.
        limit: number of documents of each task, from the first, or their fraction if below 1.
        num_fewshot: solved examples before each question; None: as each task says.
        batch_size: sequences generated side by side, and rows of 1,024 tokens a forward pass when scoring.
        max_length: longest input in tokens; None: the model's context.
        apply_chat_template: ask in the tokenizer's chat template.
        seed: seed of few-shot examples and sampled tokens.
        log_samples: keep requests and answers, document by document.
        world: the processes that share the requests, all of which call this with the same tasks.
    """
    from lm_eval import simple_evaluate

    from kdtune.evaluation.lm_eval_model import KDTuneLM

    with _machine_described_once():
        found = simple_evaluate(
            model=KDTuneLM(model, tokenizer, batch_size=batch_size, max_length=max_length, seed=seed, world=world),
            tasks=tasks,
            task_manager=_manager(None, False),
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            limit=limit,
            apply_chat_template=apply_chat_template,
            bootstrap_iters=_BOOTSTRAP_ITERS if world.is_main else 0,
            log_samples=log_samples,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    return dict(found) if found is not None and world.is_main else {}


@contextmanager
def _machine_described_once() -> Iterator[None]:
    """Cache lm-eval's description of machine and packages, which takes seconds at every call, for this process."""
    from torch.utils import collect_env

    collect = collect_env.get_pretty_env_info
    collect_env.get_pretty_env_info = _machine_description
    try:
        yield
    finally:
        collect_env.get_pretty_env_info = collect


@cache
def _machine_description() -> str:
    from torch.utils.collect_env import get_env_info, pretty_str

    description: str = pretty_str(get_env_info())
    return description


def flat_metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a results document as TASK/METRIC and TASK/METRIC_stderr; a filter other than "none" is appended."""
    return {
        f"{name}/{metric}{'' if filter_name == 'none' else ',' + filter_name}": float(value)
        for name, values in results["results"].items()
        for (metric, filter_name), value in _metric_items(values)
    }


def results_rows(results: Mapping[str, Any]) -> list[dict[str, object]]:
    """Return one row per task and metric, for a table: task, shots, metric, value and standard error."""
    rows: list[dict[str, object]] = []
    for name, values in results["results"].items():
        found = dict(_metric_items(values))
        for (metric, filter_name), value in found.items():
            if metric.endswith("_stderr"):
                continue
            label = metric if filter_name == "none" else f"{metric} ({filter_name})"
            error = found.get((f"{metric}_stderr", filter_name))
            rows.append({"task": name, "shots": results["n-shot"].get(name), "metric": label, "value": float(value),
                         "± stderr": error})  # fmt: skip
    return rows


def _metric_items(values: Mapping[str, Any]) -> list[tuple[tuple[str, str], float]]:
    """Return ((metric, filter), value) for a task's entries that are numbers."""
    items = []
    for key, value in values.items():
        metric, comma, filter_name = key.partition(",")
        if comma and isinstance(value, int | float):
            items.append(((metric, filter_name), float(value)))
    return items
