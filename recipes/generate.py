"""Generate text from a model: one answer token by token on the terminal, or many into a file.

    kdtune run generate --config generation checkpointer.checkpoint_dir=MODEL tokenizer.path=MODEL prompt="Why is the sky blue?"
    kdtune run generate --config smollm2/generation prompt_file=questions.txt output_file=answers.jsonl batch_size=8
    kdtune run --nproc_per_node 4 generate --config generation prompt_file=questions.txt output_file=answers.jsonl

Any checkpoint that kdtune reads works: a Hugging Face folder, a GGUF file, Meta's files, a model with an adapter
(checkpointer.adapter_dir), a quantized folder. Several processes share the batches, with the same answers as one.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from kdtune import checkpoint, config, distributed, generation, parallel, runs, teachers, tokenizers, training
from kdtune.data import Conversation, Message
from kdtune.errors import ConfigError, DataError
from kdtune.log import bar_settings, fit_for_stdout
from kdtune.models import Transformer, dtype_from_name

OnAnswer = Callable[[int, list[int]], None]
"""Called with a prompt's number, from 0, and the ids of its answer."""


@dataclass(kw_only=True)
class Config:
    """All keys of this recipe."""

    models_dir: config.PathText = "/tmp"
    """Folder of downloaded models, for a config's own paths: ${models_dir}/Llama-3.2-1B-Instruct."""

    # Model
    checkpointer: Any = config.component(default=None, returns=checkpoint.Checkpointer)
    """The weights (kdtune.checkpoint.Checkpointer); null: random weights, with a builder in `model`."""
    model: Any = config.component(default=None, returns=Transformer)
    """The builder, checked against the checkpoint; null: built from the checkpoint's own config."""
    tokenizer: Any = config.component(returns=tokenizers.Tokenizer)
    """The tokenizer, such as kdtune.tokenizers.load."""
    device: str | None = None
    """cpu, cuda, cuda:N or mps; null: the best one there is."""
    dtype: Literal["fp32", "bf16"] | None = None
    """Weight dtype in memory; null: as stored."""
    parallelism: Any = config.component(
        default={"_component_": "kdtune.distributed.Parallelism", "dp_replicate": -1, "dp_shard": 1}
    )
    """Parallelism of the model over the processes that torchrun starts: a full copy on each, or with dp_shard=-1
    dp_replicate=1 a shard, which needs a dtype; with one process it does nothing."""

    # Prompts: one of the three
    prompt: str | dict[str, str | None] | None = None
    """The prompt, or a mapping with `user` and `system`; its answer is printed token by token."""
    prompts: list[str] | None = None
    """Several prompts."""
    prompt_file: config.PathText | None = None
    """A .txt file of one prompt per line, or a .json or .jsonl file of rows with prompt, instruction or messages."""
    system_prompt: str | None = None
    """System message before each prompt; null: the chat template's default."""
    chat: bool = True
    """Prompts are questions, put into the tokenizer's chat template; false: plain text to be continued."""

    # Sampling
    max_new_tokens: int = 300
    """Longest answer, in tokens."""
    temperature: float = 0.6
    """Sampling temperature: below 1, likely tokens become likelier; 0 always takes the most likely one."""
    top_k: int | None = None
    """Sample from this many most likely tokens; null: from all."""
    top_p: float | None = None
    """Sample from the fewest most likely tokens that hold this share of the probability; null: from all."""
    seed: int = 0
    """Seed of the sampling; prompt number i, from 0, uses seed + i, whatever the batch size is."""
    batch_size: int = 8
    """Prompts per batch."""

    # Output
    output_file: config.PathText | None = None
    """A .jsonl file for the answers, one row each in the prompts' order, instead of the terminal. It appears when it is
    complete; until then finished answers are in output_file.partial, which stays if the run is stopped."""
    overwrite: bool = False
    """Replace an existing output_file; otherwise it is an error."""

    def problems(self) -> list[str]:
        """Return config problems, one sentence each."""
        found = training.device_name_problems(self.device)
        given = [key for key in ("prompt", "prompts", "prompt_file") if getattr(self, key) is not None]
        if not given:
            found.append("prompt, prompts, prompt_file: none given; give one of them, such as prompt=...")
        if len(given) > 1:
            found.append(
                f"{', '.join(given)}: only one can be given; remove the rest: {' or '.join(f'~{key}' for key in given)}"
            )
        if self.prompts == []:
            found.append("prompts=[]: holds no prompt; give at least one")
        if isinstance(self.prompt, dict):
            if unknown := sorted(self.prompt.keys() - {"user", "system"}):
                found.append(f"prompt.{unknown[0]}: unknown; a prompt has user and system")
            if self.prompt.get("system") is not None and self.system_prompt is not None:
                found.append(
                    "prompt.system, system_prompt: both given; they mean the same, remove one: ~prompt.system or ~system_prompt"
                )
        if self.batch_size < 1:
            found.append(f"batch_size={self.batch_size}: must be at least 1")
        try:
            generation.check_max_new_tokens(self.max_new_tokens)
            generation.Sampling(self.temperature, self.top_k, self.top_p)
        except ConfigError as error:
            found.append(str(error))
        if self.model is None and self.checkpointer is None:
            found.append("checkpointer: missing, and no model to start from random weights; give one of them")
        if self.output_file is None and self.overwrite:
            found.append("overwrite=true: there is no output_file to replace; give output_file=..., or ~overwrite")
        return found + training.builder_problems(self)

    def machine_problems(self) -> list[str]:
        """Return machine problems, found without reading weights."""
        found = training.device_problems(self.device, self.dtype or "fp32", distributed=True)
        found += parallel.problems(self)
        parallelism = config.instantiate(self.parallelism)
        is_copy = parallelism and {parallelism.dp_shard, parallelism.tp} == {1} and parallelism.is_plain
        if distributed.is_under_torchrun() and self.dtype is None and parallelism and not is_copy:
            found.append(
                "dtype=null: parallelism.dp_shard or tp above 1, cpu_offload and param_dtype need one; give fp32 or bf16"
            )
        if self.prompt_file is not None and not Path(self.prompt_file).is_file():
            found.append(f"prompt_file={self.prompt_file}: no such file")
        if self.output_file is not None:
            found += file_problems(self.output_file, overwrite=self.overwrite)
        if checkpointer := config.instantiate(self.checkpointer):
            found += [f"checkpointer: {problem}" for problem in checkpointer.problems()]
        return found


@config.entry_point(Config)
def main(cfg: Config) -> None:
    """Run the recipe."""
    with (
        config.instantiate(cfg.parallelism).start_world(training.resolve_device(cfg.device)) as world,
        world.rank0_stderr(),
    ):
        run(cfg, world)


def run(cfg: Config, world: distributed.World) -> None:
    """Generate the answers of the config: prompts, model, output."""
    tokenizer = config.instantiate(cfg.tokenizer)
    conversations = read_conversations(cfg)
    builder, checkpointer = config.factory(cfg.model), config.instantiate(cfg.checkpointer)
    context = parallel.model_config(builder, checkpointer).max_seq_len
    prompts = [encode(cfg, tokenizer, one, number, context) for number, one in enumerate(conversations, 1)]

    teachers.check_tokenizer(tokenizer, checkpointer, "checkpointer", path=cfg.tokenizer.get("path"))

    training.set_seed(cfg.seed)
    dtype = dtype_from_name(cfg.dtype) if cfg.dtype else None
    model = parallel.build_model(
        builder,
        checkpointer,
        dtype=dtype,
        world=world,
        parallelism=config.instantiate(cfg.parallelism),
        trainable=False,
    )
    tokenizers.check_vocabulary(tokenizer, model.config.vocab_size)
    start = time.perf_counter()
    answer = stream if len(prompts) == 1 else answer_in_batches
    # Each answer is saved when it is done, so that a stopped run keeps them.
    rows: list[dict[str, Any]] = []
    file = Path(cfg.output_file) if cfg.output_file is not None and world.is_main else None
    prints = file is None and len(prompts) > 1 and world.is_main
    with checkpoint.collected_rows(file) if file else printed_in_order() if prints else nullcontext() as keep:

        def on_answer(index: int, new_ids: list[int]) -> None:
            rows.append(as_row(conversations[index], prompts[index], new_ids, tokenizer))
            if keep is not None:
                keep(index + 1, rows[-1])

        answer(cfg, model, tokenizer, prompts, world, on_answer)
    seconds = time.perf_counter() - start
    if not world.is_main:
        return

    if file is not None:
        print(f"wrote {file}: {len(rows)} answers")
    num_tokens = sum(row["num_new_tokens"] for row in rows)
    speed = f"{num_tokens} tokens in {seconds:.1f} s: {num_tokens / seconds:.1f} tokens/s"
    cut = sum(row["finish_reason"] == "length" for row in rows)
    limits = f"max_new_tokens={cfg.max_new_tokens} or the model's context"
    print(f"{speed}; {cut} of {len(rows)} answers cut off by {limits}" if cut else speed)


def file_problems(output_file: str, *, overwrite: bool) -> list[str]:
    """Return why the file could not be written; writes nothing."""
    file = Path(output_file)
    partial = checkpoint.partial_of(file)
    try:
        if file.is_dir():
            return [f"output_file={output_file}: is a folder; name a file"]
        if file.exists() and not overwrite:
            return [f"output_file={output_file}: exists; overwrite=true replaces it, or choose another name"]
        if partial.exists() and not overwrite:
            return [f"output_file={output_file}: {partial.name} beside it has the answers of a run that was stopped; "
                    "overwrite=true replaces them, or move it away, or choose another name"]  # fmt: skip
    except OSError as error:  # a name that is too long, or in a folder that may not be looked into
        return [f"output_file={output_file}: {error.strerror}; choose another name"]
    found = runs.output_dir_problems(str(file.parent), resume=True)
    reasons = [problem.removeprefix("output_dir=").replace("output_dir", "output_file") for problem in found]
    return [f"output_file={output_file}: its folder cannot be written to: {reason}" for reason in reasons]


def read_conversations(cfg: Config) -> list[Conversation]:
    """Return the prompts, each as the messages before its answer."""
    if cfg.prompt_file is not None:
        return generation.read_prompts(cfg.prompt_file)
    prompt = cfg.prompt.get("user") if isinstance(cfg.prompt, dict) else cfg.prompt
    texts = cfg.prompts if cfg.prompts is not None else [prompt]
    return [Conversation([Message("user", text or "")]) for text in texts]


def encode(cfg: Config, tokenizer: Any, conversation: Conversation, number: int, context: int) -> list[int]:
    """Return a prompt's ids; raise, with its number, if it is empty or leaves no room in the context."""
    system = cfg.prompt.get("system") if isinstance(cfg.prompt, dict) else None
    try:
        ids = generation.encode_prompt(
            tokenizer, conversation, system_prompt=system or cfg.system_prompt, chat=cfg.chat
        )
    except DataError as error:
        raise DataError(f"prompt {number}: {error}") from error
    if len(ids) >= context:
        raise DataError(f"prompt {number}: {len(ids)} tokens; the model's context is {context}: shorten it")
    return ids


def stream(
    cfg: Config,
    model: Transformer,
    tokenizer: Any,
    prompts: list[list[int]],
    world: distributed.World,
    on_answer: OnAnswer,
) -> None:
    """Answer one prompt; print the text as it is generated, unless it goes to a file."""
    text = generation.TextStream(tokenizer, lambda piece: print(fit_for_stdout(piece), end="", flush=True))
    on_token = text.add if cfg.output_file is None and world.is_main else None

    def answer(prompt: list[int]) -> list[int]:
        return generation.generate(model, prompt, **sampling(cfg, tokenizer), seed=cfg.seed, on_token=on_token)

    (new_ids,) = distributed.parallel_map(answer, prompts, model, world)  # the main process's, as it is the first
    if cfg.output_file is None and world.is_main:
        text.finish()
        print("\n")
    on_answer(0, new_ids)


def answer_in_batches(
    cfg: Config,
    model: Transformer,
    tokenizer: Any,
    prompts: list[list[int]],
    world: distributed.World,
    on_answer: OnAnswer,
) -> None:
    """Answer the prompts in batches of similar length."""
    lengths = [len(prompt) for prompt in prompts]

    def answer(batch: list[int]) -> list[list[int]]:
        seeds = [cfg.seed + index for index in batch]
        return generation.generate_batch(
            model, [prompts[index] for index in batch], **sampling(cfg, tokenizer), seed=seeds
        )

    with tqdm(total=len(prompts), unit="prompt", desc="generating", **bar_settings()) as bar:
        distributed.parallel_map_batched(
            answer, lengths, cfg.batch_size, model, world, on_done=bar.update, on_result=on_answer
        )


@contextmanager
def printed_in_order() -> Iterator[Callable[[int, Mapping[str, Any]], None]]:
    """Yield a function that takes a prompt's number, from 1, and its row, and prints the rows in the prompts' order.

    A row that arrives before its turn is held back; a run that is stopped prints those too.
    """
    held: dict[int, str] = {}
    turn = 1

    def show(number: int, row: Mapping[str, Any]) -> None:
        nonlocal turn
        held[number] = fit_for_stdout(f"> {row['prompt']}\n{row['answer']}\n")
        while turn in held:
            tqdm.write(held.pop(turn))
            turn += 1

    try:
        yield show
    finally:
        for number in sorted(held):
            tqdm.write(held[number])


def sampling(cfg: Config, tokenizer: Any) -> dict[str, Any]:
    """Return the settings that every prompt shares."""
    return {
        "max_new_tokens": cfg.max_new_tokens,
        "stop_ids": tokenizer.stop_ids,
        "sampling": generation.Sampling(cfg.temperature, cfg.top_k, cfg.top_p),
    }


def as_row(conversation: Conversation, prompt: list[int], new_ids: list[int], tokenizer: Any) -> dict[str, Any]:
    """Return output_file's row for a prompt: last message and answer as text, and the number of tokens of each."""
    return {
        "prompt": conversation.messages[-1].content,
        "answer": tokenizer.decode(new_ids),
        "num_prompt_tokens": len(prompt),
        "num_new_tokens": len(new_ids),
        "finish_reason": "stop" if new_ids[-1] in tokenizer.stop_ids else "length",
    }


if __name__ == "__main__":
    main()
