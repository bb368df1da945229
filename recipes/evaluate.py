"""Measure a model: lm-eval's tasks, held-out loss and distance to a teacher, perplexity of texts, ROUGE-L of answers.

    kdtune run evaluate run=runs/quickstart/kd
    kdtune run evaluate run=runs/smollm2-kd run_weights=step_500 tasks=[hellaswag] limit=100
    kdtune run eleuther_eval --config eleuther_evaluation
    kdtune run eleuther_eval --config smollm2/evaluation tasks=[hellaswag] limit=100
    kdtune run --nproc_per_node 4 eleuther_eval_distributed --config eleuther_evaluation

With `run`, measure a finished run of finetune or knowledge_distillation, with the data, teacher, tokenizer and kd_loss it was
trained with. The config selects the measurements: `tasks`, `dataset_val` (with a teacher: KL and agreement too), `perplexity_files`,
`rouge`. The model may be a Hugging Face folder, Meta's files, a GGUF, an adapter on its base, or a quantized folder.
`output_dir` appears when everything is measured: `metrics` in its results.json has every number under a flat name. Until
then each finished measurement is in `output_dir.partial`, and stays there if the evaluation is stopped.
Several processes share the work batch by batch, with the same results as one.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from kdtune import checkpoint, config, data, evaluation, losses, parallel, reports, runs, teachers, tokenizers, training
from kdtune.distributed import World
from kdtune.log import bar_settings
from kdtune.models import Transformer, dtype_from_name

ALIASES = ("eleuther_eval", "eleuther_eval_distributed", "evaluate_distributed")


@dataclass(kw_only=True)
class Config(teachers.TeacherConfig):
    """All keys of this recipe."""

    output_dir: config.PathText
    """Folder to write, which must not exist yet: results.json, config.yaml, run.json and samples/."""
    models_dir: config.PathText = "/tmp"
    """Folder of downloaded models, for a config's own paths: ${models_dir}/Llama-3.2-1B-Instruct."""

    # A finished run
    run: config.PathText | None = None
    """Folder of a finished run of finetune or knowledge_distillation: its model, tokenizer, dataset_val, teacher, kd_loss,
    dtype, device and batch size are the defaults for keys that this config omits. output_dir is then RUN/evaluation."""
    run_weights: str = "final"
    """Weights of that run to measure: final, best (the step_N its best_metric names), or step_N."""

    # Model
    checkpointer: Any = config.component(default=None, returns=checkpoint.Checkpointer)
    """The model's weights (kdtune.checkpoint.Checkpointer); null: random weights, with a builder in `model`."""
    model: Any = config.component(default=None, returns=Transformer)
    """The model's builder, checked against its checkpoint; null: built from the checkpoint's own config."""
    tokenizer: Any = config.component(returns=tokenizers.Tokenizer)
    """The model's tokenizer, such as kdtune.tokenizers.load; max_seq_len is the longest example of dataset_val."""
    device: str | None = None
    """cpu, cuda, cuda:N or mps; null: the best one there is."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Weight dtype."""
    quantization: str | None = None
    """Quantize the linears of the model's layers as they are read: a scheme of `kdtune ls quantize`; null: no."""
    parallelism: Any = config.component(
        default={"_component_": "kdtune.distributed.Parallelism", "dp_replicate": -1, "dp_shard": 1}
    )
    """Parallelism of the model over the processes that torchrun starts: a full copy on each, or with dp_shard=-1
    dp_replicate=1 a shard; with one process it does nothing."""
    batch_size: int = 8
    """Sequences generated, or examples of dataset_val, at a time; scored are up to batch_size * 1,024 tokens at a time."""
    max_seq_length: int | None = None
    """Longest input in tokens, cut on the left; null: the model's context."""
    seed: int = 1234
    """Seed of few-shot examples and sampled tokens (1234 is lm-eval's own), and of random weights."""

    # lm-eval
    tasks: list[str] = field(default_factory=list)
    """Names of lm-eval tasks, groups or tags, or paths of task files; needs pip install 'lm-eval>=0.4.13'."""
    include_path: config.PathText | None = None
    """A folder of your own task files, searched before lm-eval's tasks."""
    limit: int | float | None = None
    """Number of documents of each task, from the first, or their fraction if below 1; null: all."""
    num_fewshot: int | None = None
    """Solved examples before each question; null: as each task says."""
    apply_chat_template: bool = False
    """Ask the tasks' questions in the tokenizer's chat template."""
    log_samples: bool = False
    """Write requests and answers, one document per line, to samples/NAME.jsonl."""

    # Held-out examples
    dataset_val: Any = config.component("tokenizer", default=None, returns=data.Dataset)
    """Held-out examples: cross entropy, and with a teacher KL and agreement."""
    teacher: Any = config.component(default=None, returns=teachers.Teacher)
    """A teacher in place of a model, as in knowledge_distillation: dataset_val is compared with the one that its validation asks, such as
    the cache in teacher.validation of kdtune.teachers.CachedTeacher."""
    kd_loss: Any = config.component(default={"_component_": "kdtune.losses.ForwardKL"})
    """The divergence from the teacher."""
    inspect: int = 0
    """Number of examples, the first of dataset_val, that inspect.html shows token by token: where the model disagrees with the
    teacher, and what both expect there."""

    # Texts and answers
    perplexity_files: list[config.PathText] = field(default_factory=list)
    """Text files; each is one text, scored window by window (max_seq_length)."""
    perplexity_stride: int | None = None
    """Tokens by which the window advances; fewer give more context and take longer; null: a full window, as in lm-eval."""
    rouge: Any = config.component(default=[], returns=evaluation.InstructionSet)
    """Instruction sets whose answers are scored: a list of kdtune.evaluation.InstructionSet."""

    @classmethod
    def inherited(cls, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the run's values for the keys that this config omits."""
        return evaluation.run_settings(given)

    def problems(self) -> list[str]:
        """Return config problems, one sentence each."""
        if self.run is not None and evaluation.run_problems(self.run, self.run_weights):
            return []  # reported by machine_problems; their consequences are not
        found = [
            f"{key}={getattr(self, key)}: must be at least 1"
            for key in ("batch_size", "max_seq_length", "perplexity_stride")
            if getattr(self, key) is not None and getattr(self, key) < 1
        ]
        if self.inspect < 0:
            found.append(f"inspect={self.inspect}: must be 0 (no page) or more examples")
        if self.limit is not None and self.limit <= 0:
            found.append(f"limit={self.limit}: must be above 0: a number of documents, or a part of them below 1")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            found.append(f"num_fewshot={self.num_fewshot}: must be at least 0")
        if self.model is None and self.checkpointer is None:
            found.append("checkpointer: missing, and no model to start from random weights; give one of them")
        if not (self.tasks or self.dataset_val or self.perplexity_files or self.rouge):
            found.append(
                "tasks, dataset_val, perplexity_files, rouge: all empty, so there is nothing to measure; give one"
            )
        found += training.device_name_problems(self.device)
        found += training.device_name_problems(self.teacher_device, "teacher_device") + teachers.place_problems(self)
        found += self._unused()
        names = [Path(path).stem for path in self.perplexity_files]
        found += [
            f"perplexity_files: {name} occurs twice; files need different names" for name in evaluation.repeated(names)
        ]
        found += training.builder_problems(self) + training.divergence_problems(self.kd_loss, is_own_text=True)
        found += data.first_row_problems(self)
        return found + evaluation.rouge_problems(self.rouge)

    def _unused(self) -> list[str]:
        """Return problems with settings that have no effect, because what they apply to is missing."""
        is_model = bool(self.teacher_checkpointer or self.teacher_model)
        has_teacher = is_model or self.teacher is not None
        found = [
            f"{key}: has no effect without tasks; give tasks, or ~{key}"
            for key in ("include_path", "limit", "num_fewshot", "apply_chat_template")
            if getattr(self, key) and not self.tasks
        ]
        if self.log_samples and not (self.tasks or self.rouge):
            found.append("log_samples=true: has no effect without tasks or rouge; give one of them, or ~log_samples")
        if self.run is None and self.run_weights != "final":
            found.append(f"run_weights={self.run_weights}: has no effect without run; give run, or ~run_weights")
        if not has_teacher and self.kd_loss != {"_component_": "kdtune.losses.ForwardKL"}:
            found.append("kd_loss: has no effect without a teacher; give teacher_checkpointer, or ~kd_loss")
        if self.inspect and self.teacher_device:
            found.append(f"inspect={self.inspect}, teacher_device={self.teacher_device}: compares the models on one device; "
                         "~inspect, or ~teacher_device")  # fmt: skip
        if self.inspect and not is_model:
            found.append(
                f"inspect={self.inspect}: needs a teacher that is a model; give teacher_checkpointer, or ~inspect"
            )
        if is_model and self.teacher is not None:
            found.append(
                "teacher: stands in place of a model, and teacher_checkpointer or teacher_model gives one; teacher=null, or ~them"
            )
        if has_teacher and self.dataset_val is None:
            given = " ".join(
                f"~{key}" for key in ("teacher_checkpointer", "teacher_model", "teacher") if getattr(self, key)
            )
            found.append(f"dataset_val: missing, the examples to compare with the teacher on; give it, or {given}")
        found += [
            f"{key}: has no effect without a teacher; give one, or ~{key}"
            for key in ("teacher_dtype", "teacher_quantization", "teacher_parallelism", *teachers.PLACES)
            if getattr(self, key) and not is_model
        ]
        if self.perplexity_stride and not self.perplexity_files:
            found.append(f"perplexity_stride={self.perplexity_stride}: has no effect without perplexity_files; "
                         "give them, or ~perplexity_stride")  # fmt: skip
        return found

    def machine_problems(self) -> list[str]:
        """Return machine problems, found without reading weights."""
        if self.run is not None and (found := evaluation.run_problems(self.run, self.run_weights)):
            return found
        found = training.placement_problems(self)
        if isinstance(judge := judge_of(self), teachers.ConfiguredTeacher):
            found += judge.problems(self)
        if self.teacher is not None and teachers.configured_teacher(self) is None:
            found.append(f"teacher: {self.teacher['_component_']} is not asked here; allowed are kdtune.teachers.CachedTeacher, "
                         "LiveTeacher, Mixture and Routed; or give teacher_checkpointer")  # fmt: skip
        if self.inspect and losses.is_of_text(config.instantiate(self.kd_loss)):
            found.append(
                f"inspect={self.inspect}: shows distributions, and this kd_loss compares likelihoods of the text; ~inspect"
            )
        if self.inspect and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            found.append(f"inspect={self.inspect}: needs both models on one process; run it without --nproc_per_node")
        found += runs.new_folder_problems(self.output_dir)
        if (partial := checkpoint.partial_of(self.output_dir)).exists():
            found.append(f"output_dir={self.output_dir}: {partial.name} beside it has what a stopped evaluation measured; "
                         "move it away or remove it, or choose another output_dir")  # fmt: skip
        for key in ("checkpointer", "teacher_checkpointer"):
            if node := config.instantiate(getattr(self, key)):
                found += [f"{key}: {problem}" for problem in node.problems()]
        found += evaluation.task_problems(self.tasks, self.include_path)
        if self.rouge and (problem := evaluation.missing_extra("rouge")):
            found.append(problem)
        return found


@config.entry_point(Config, default_config="evaluation")
def main(cfg: Config) -> None:
    """Run the recipe."""
    with (
        config.instantiate(cfg.parallelism).start_world(training.resolve_device(cfg.device)) as world,
        world.rank0_stderr(),
    ):
        tokenizer, cfg = training.load_tokenizer(cfg)
        measured = run(cfg, tokenizer, world)
    # No process waits for rank 0 while it writes.
    if world.is_main:
        write_results(cfg, measured)


def run(cfg: Config, tokenizer: tokenizers.Tokenizer, world: World) -> evaluation.Measured:
    """Load data and model, and measure."""
    training.set_seed(cfg.seed)

    # Data first: no weight is read if a dataset or split is missing.
    tasks = evaluation.load_tasks(cfg.tasks, cfg.include_path, num_fewshot=cfg.num_fewshot) if cfg.tasks else []
    texts = {Path(path).stem: evaluation.read_text(path) for path in cfg.perplexity_files}
    rouge_sets = [(one, one.read()) for one in config.instantiate(cfg.rouge)]
    held_out = load_held_out(cfg, tokenizer, world)

    # Model.
    model = parallel.build_model(
        config.factory(cfg.model), config.instantiate(cfg.checkpointer), dtype=dtype_from_name(cfg.dtype), world=world,
        parallelism=config.instantiate(cfg.parallelism), trainable=False, quantization=cfg.quantization,
    ).eval()  # fmt: skip
    tokenizers.check_vocabulary(tokenizer, model.config.vocab_size)
    if held_out is not None:
        losses.check_head("model", model.output)
    shared: dict[str, Any] = {"max_length": cfg.max_seq_length or model.config.max_seq_len, "batch_size": cfg.batch_size,
                              "world": world}  # fmt: skip

    # Measurements; each is saved when it is done, so that a stopped evaluation keeps them.
    measured = evaluation.Measured()

    def keep() -> None:
        if world.is_main:
            partial = checkpoint.partial_of(cfg.output_dir)
            measured.write(partial, versions=versions(cfg), log_samples=cfg.log_samples)

    if held_out is not None:
        values, pages = measure_held_out(cfg, model, tokenizer, held_out, world)
        measured.metrics |= values
        measured.pages |= pages
        keep()
    for name, text in texts.items():
        found = evaluation.text_perplexity(
            model, tokenizer, text, stride=cfg.perplexity_stride, show_progress=True, **shared
        )
        measured.add_perplexity(name, found)
        keep()
    for one, instructions in rouge_sets:
        total = len(instructions) * len(one.seeds)
        with tqdm(total=total, desc=f"answering {one.name}", unit="answer", **bar_settings()) as bar:
            scored = evaluation.evaluate_rouge(model, tokenizer, one, instructions, on_answered=bar.update, **shared)
        measured.add_rouge(one.name, scored, len(instructions))
        keep()
    for task in tasks:
        settings = {
            key: getattr(cfg, key) for key in ("limit", "num_fewshot", "apply_chat_template", "seed", "log_samples")
        }
        measured.add_tasks(evaluation.evaluate_tasks(model, tokenizer, [task], **settings, **shared))
        keep()
    return measured


def judge_of(cfg: Config) -> teachers.Teacher | None:
    """Return the teacher that a validation with the key `teacher` asks, not started; None: there is none for held-out examples."""
    teacher = teachers.configured_teacher(cfg)
    return None if teacher is None else teacher.held_out


def load_held_out(cfg: Config, tokenizer: tokenizers.Tokenizer, world: World) -> list[data.Batch] | None:
    """Return this process's batches of dataset_val, checked with the tokenizer against both checkpoints' folders."""
    training.check_context(cfg, "max_seq_length")
    dataset_val = data.load_dataset("dataset_val", cfg.dataset_val, tokenizer)
    if dataset_val is not None:
        training.check_data(cfg, {"dataset_val": dataset_val}, world, tokenizer)
        if isinstance(judge := judge_of(cfg), teachers.ConfiguredTeacher):
            dataset_val = judge.fit_data("dataset_val", tokenizer, dataset_val)
    for key in ("checkpointer", "teacher_checkpointer"):
        teachers.check_tokenizer(tokenizer, config.instantiate(getattr(cfg, key)), key, path=cfg.tokenizer.get("path"),
                                 is_chat=dataset_val is not None and dataset_val.is_chat)  # fmt: skip
    if dataset_val is None:
        return None
    return list(
        data.batches(
            dataset_val,
            cfg.batch_size,
            tokenizer.pad_id,
            rank=world.dp_rank,
            num_ranks=world.dp_size,
            padding_free=True,
        )
    )


def versions(cfg: Config) -> dict[str, Any]:
    """Return the versions of the packages used for measuring."""
    found: dict[str, Any] = config.run_record(cfg)["versions"]
    return found | ({name: version(name) for name in ("lm_eval", "rouge_score")} if cfg.tasks or cfg.rouge else {})


def write_results(cfg: Config, measured: evaluation.Measured) -> None:
    """Print the table, and write the folder."""
    prefix = "held_out/"
    if held_out := {
        name.removeprefix(prefix): value for name, value in measured.metrics.items() if name.startswith(prefix)
    }:
        divergence = losses.divergence_name(config.instantiate(cfg.kd_loss))
        print(runs.held_out_table(held_out, f"model, {held_out['tokens']:,} tokens", divergence=divergence))
    if rows := [row for row in measured.rows() if row["task"] != prefix.rstrip("/")]:
        print(runs.format_table(rows))
    record = config.run_record(cfg) | {"versions": versions(cfg)}
    with checkpoint.atomic_folder(cfg.output_dir) as folder:
        runs.write_run_files(folder, resolved_config=config.resolved_yaml(cfg), record=record)
        measured.write(folder, versions=record["versions"], log_samples=cfg.log_samples)
    checkpoint.remove_folder(checkpoint.partial_of(cfg.output_dir))
    for name in ["results.json", *measured.pages]:
        print(f"{Path(name).stem + ':':<9}{Path(cfg.output_dir) / name}")


def measure_held_out(
    cfg: Config, model: Transformer, tokenizer: Any, held_out: list[data.Batch], world: World
) -> tuple[dict[str, float], dict[str, str]]:
    """Measure cross entropy in nats per token and perplexity; with a teacher also its cross entropy, KL and top-1 agreement.

    Return the numbers by their flat names, and the pages that `inspect` asks for, by name. Where weights are quantized on the
    way, the numbers include both models' bytes and speed.
    """
    progress = lambda batches: tqdm(batches, desc="held-out examples", unit="batch", **bar_settings())  # noqa: E731
    teacher: teachers.Teacher | None = judge_of(cfg)
    if isinstance(teacher, teachers.ConfiguredTeacher):
        teacher.start(cfg, world)
    elif cfg.teacher_checkpointer or cfg.teacher_model:
        teacher = teachers.build_online_teacher(cfg, world)
    if teacher is None:
        return _of("held_out", evaluation.evaluate_ce(model, held_out, world=world, progress=progress)), {}
    teacher.prefetch(held_out)
    kd_loss = config.instantiate(cfg.kd_loss)
    teachers.check_vocabularies(tokenizer, model.config.vocab_size, teacher.vocab_size, kd_loss)
    loss = losses.KDLoss(kd_loss, kd_ratio=1.0)
    found = evaluation.evaluate_kd(
        model, teacher, loss, held_out, world=world, progress=progress, with_teacher_loss=True
    )
    found["perplexity"] = evaluation.perplexity(found["class_loss"])
    numbers = _of("held_out", found)
    models = {"model": model} | ({"teacher": teacher.model} if isinstance(teacher, teachers.OnlineTeacher) else {})
    if cfg.quantization or cfg.teacher_quantization:
        for name, one in models.items():
            numbers |= _of(f"cost/{name}", evaluation.forward_cost(one, held_out))
    return numbers, inspected(cfg, model, models["teacher"], tokenizer, held_out) if cfg.inspect else {}


def _of(measurement: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{measurement}/{name}": value for name, value in values.items()}


def inspected(
    cfg: Config, model: Transformer, teacher: Transformer, tokenizer: Any, held_out: list[data.Batch]
) -> dict[str, str]:
    """Return the page of the first held-out examples, token by token."""
    divergence = config.instantiate(cfg.kd_loss)
    rows: list[list[dict[str, Any]]] = []
    for batch in held_out:
        if len(rows) < cfg.inspect:
            text_of = lambda one: tokenizer.decode([one], skip_special=False)  # noqa: E731
            divergence_of = losses.divergence_of(divergence)
            rows += evaluation.inspect_tokens(model, teacher, divergence_of, batch.to(model.device), text_of)
    page = reports.token_page(
        "Teacher and student, token by token", losses.divergence_name(divergence), rows[: cfg.inspect]
    )
    return {"inspect.html": page}


if __name__ == "__main__":
    main()
