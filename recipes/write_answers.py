"""Let a model answer the prompts of a data set once, for students that learn from its text (sequence-level distillation).

    kdtune run write_answers --config tiny/write_answers
    kdtune run write_answers --config smollm2/write_answers num_answers=4 keep_best=1
    kdtune run --nproc_per_node 8 write_answers --config llama3_1/8B_write_answers

Writes a folder of JSON lines with token ids, which `kdtune.data.answers_dataset` reads as a `dataset` of finetune,
knowledge_distillation or cache_teacher (docs/regimes.md). An answer depends on the seed and its prompt alone. A run that is stopped, or
killed, keeps its files; the same command goes on, on any number of processes, and the files are the same.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kdtune import checkpoint, config, data, generation, parallel, rollouts, runs, teachers, tokenizers, training
from kdtune.data.answers import answers_file
from kdtune.distributed import World, parallel_map, raise_on_all_ranks
from kdtune.errors import ConfigError, TrainingError
from kdtune.models import Transformer, dtype_from_name
from kdtune.paths import user_path


@dataclass(kw_only=True)
class Config:
    """All keys of this recipe."""

    output_dir: config.PathText
    """The folder of the answers, on a disk that all processes share: a new one, or that of the run to go on with."""
    models_dir: config.PathText = "/tmp"
    """Folder of downloaded models, for a config's own paths: ${models_dir}/Llama-3.2-1B-Instruct."""

    # Model
    checkpointer: Any = config.component(default=None, returns=checkpoint.Checkpointer)
    """The writer's weights, with `adapter_dir` a finetuned adapter merged in; null: random, with a builder in `model`."""
    model: Any = config.component(default=None, returns=Transformer)
    """The writer's builder; null: built from the checkpoint's own config."""
    tokenizer: Any = config.component(returns=tokenizers.Tokenizer)
    """The tokenizer, as the students' runs have it; max_seq_len is the longest prompt with its answer, in tokens."""
    device: str | None = None
    """cpu, cuda, cuda:N or mps; null: the best one there is."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Weight dtype."""
    parallelism: Any = config.component(
        default={"_component_": "kdtune.distributed.Parallelism", "dp_replicate": -1, "dp_shard": 1}
    )
    """Parallelism of the model over the processes that torchrun starts: a full copy on each, or with dp_shard=-1 dp_replicate=1
    a shard."""

    # Prompts and answers
    dataset: Any = config.component("tokenizer", returns=data.Dataset)
    """The data, as a run would be trained on it: the prompts are what comes before its first trained tokens."""
    max_prompts: int | None = config.key(None, at_least=1)
    """Number of prompts, the first ones; null: all."""
    num_answers: int = config.key(1, at_least=1)
    """Answers that are written after each prompt."""
    keep_best: int | None = config.key(None, at_least=1)
    """Of these, keep so many with the highest mean log-probability of a token by the writer itself; null: all."""
    max_new_tokens: int = config.key(256, at_least=1)
    """Longest answer, in tokens."""
    temperature: float = 1.0
    """Sampling temperature; 0 takes the most likely token."""
    top_k: int | None = None
    """Sample from this many most likely tokens; null: from all."""
    top_p: float | None = None
    """Sample from the fewest most likely tokens that hold this share of the probability; null: from all."""
    seed: int = 0
    """Seed of the sampling, and of random weights."""
    slots: int = config.key(32, at_least=1)
    """Answers that a process writes at a time."""
    prompts_per_file: int = config.key(256, at_least=1)
    """Prompts of a file; a run that is stopped goes on at the next one."""

    def problems(self) -> list[str]:
        """Return config problems, one sentence each."""
        found = training.range_problems(self) + training.device_name_problems(self.device)
        try:
            generation.Sampling(self.temperature, self.top_k, self.top_p)
        except ConfigError as error:
            found.append(str(error))
        if self.temperature == 0 and self.num_answers > 1:
            found.append(f"num_answers={self.num_answers}: with temperature=0 all answers to a prompt are equal; set 1")
        if self.keep_best is not None and self.keep_best >= self.num_answers:
            found.append(
                f"keep_best={self.keep_best}: must be below num_answers={self.num_answers}; ~keep_best keeps all"
            )
        if self.model is None and self.checkpointer is None:
            found.append("checkpointer: missing, and no model to start from random weights; give one of them")
        if (tp := getattr(config.instantiate(self.parallelism), "tp", 1)) > 1:
            found.append(
                f"parallelism.tp={tp}: each process writes answers of its own; tp=1, and dp_shard=-1 divides the model"
            )
        return found + training.builder_problems(self) + data.first_row_problems(self, prompts_alone=["dataset"])

    def machine_problems(self) -> list[str]:
        """Return machine problems, found without reading weights."""
        found = training.placement_problems(self)
        if source := config.instantiate(self.checkpointer):
            found += [f"checkpointer: {problem}" for problem in source.problems()]
        return found


@config.entry_point(Config)
def main(cfg: Config) -> None:
    """Run the recipe."""
    with (
        config.instantiate(cfg.parallelism).start_world(training.resolve_device(cfg.device)) as world,
        runs.Progress(silent=not world.is_main) as progress,
        world.rank0_stderr(),
    ):
        run(cfg, world, progress)


def run(cfg: Config, world: World, progress: runs.Progress) -> None:
    """Write the files that are missing in the folder."""
    # Prompts. They come first: no weight is read for a folder that holds other answers.
    tokenizer, cfg = training.load_tokenizer(cfg)
    progress.phase("reading the data")
    dataset = data.load_dataset("dataset", cfg.dataset, tokenizer)
    rollouts.check_prompts(dataset)
    training.check_data(cfg, {"dataset": dataset}, world, tokenizer, prompts_alone=["dataset"])
    prompts = list(rollouts.prompts_of_dataset(dataset, cfg.max_prompts))
    parts = [prompts[start : start + cfg.prompts_per_file] for start in range(0, len(prompts), cfg.prompts_per_file)]
    checkpointer = config.instantiate(cfg.checkpointer)
    teachers.check_tokenizer(tokenizer, checkpointer, path=cfg.tokenizer.get("path"), is_chat=dataset.is_chat)
    folder = user_path(cfg.output_dir)
    with raise_on_all_ranks():
        if world.is_main:
            header = rollouts.answers_header(cfg, tokenizer, dataset, len(prompts), len(parts))
            rollouts.start_answers(cfg, folder, header)
    missing = world.broadcast([number for number in range(len(parts)) if not (folder / answers_file(number)).is_file()])
    if not missing:
        return world.print(f"{folder}: is complete\n{rollouts.answers_summary(folder)}")

    progress.phase("loading the model")
    training.set_seed(cfg.seed)
    model = parallel.build_model(config.factory(cfg.model), checkpointer, dtype=dtype_from_name(cfg.dtype), world=world,
                                 parallelism=config.instantiate(cfg.parallelism), trainable=False)  # fmt: skip
    tokenizers.check_vocabulary(tokenizer, model.config.vocab_size)

    # Files, each written whole by one process.
    done = len(parts) - len(missing)
    progress.start(len(parts), done, doing="writing", unit="file")
    with runs.InterruptFlag() as interrupt:

        def write(number: int) -> None:
            if interrupt.requested:
                raise TrainingError(
                    f"stopped by {interrupt.signal_name}: whole files are kept; the same command goes on"
                )
            rows = rollouts.answer_rows(cfg, model, tokenizer, parts[number], progress.share)
            checkpoint.atomic_write_text(folder / answers_file(number), "".join(json.dumps(row) + "\n" for row in rows))

        def count(numbers: Sequence[int]) -> None:
            nonlocal done
            done += len(numbers)
            progress.step(done, [f"prompt {min((numbers[-1] + 1) * cfg.prompts_per_file, len(prompts)):,}"])

        parallel_map(write, missing, model, world, on_done=count)
    progress.end_steps()
    world.print(f"{folder}\n{rollouts.answers_summary(folder)}" if world.is_main else "")


if __name__ == "__main__":
    main()
