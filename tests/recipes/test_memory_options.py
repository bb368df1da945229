"""Options that save memory: each pair trains as without them, or is refused by name before a weight is read."""

import json
from itertools import combinations
from pathlib import Path

import pytest
import torch
import torch._dynamo.config
from command_line import CLI

RUN = ["run", "knowledge_distillation", "--config", "tiny/knowledge_distillation", "sample_prompts=[]", "~dataset_val", "~lr_scheduler",
       "run_val_every_n_steps=null", "save_every_n_steps=null", "max_steps_per_epoch=2", "gradient_accumulation_steps=1",
       "~clip_grad_norm", "batch_size=2", "tokenizer.max_seq_len=64"]  # fmt: skip
LORA = ["adapter=kdtune.models.apply_lora"]
OPTIONS = {
    "full checkpointing": ["activation_checkpointing=full"],
    "selective checkpointing": ["activation_checkpointing=selective"],
    "every second layer": ["activation_checkpointing=2"],
    "offloading": ["activation_offloading=true"],
    "in backward": ["optimizer_in_backward=true"],
    "micro-batches by tokens": ["tokens_per_micro_batch=64"],
    "accumulation": ["gradient_accumulation_steps=2", "batch_size=1"],
    "clipping": ["clip_grad_norm=100.0"],
    "8-bit optimizer": ["optimizer=torchao.optim.AdamW8bit", "optimizer.lr=1e-2"],
    "4-bit optimizer": ["optimizer=torchao.optim.AdamW4bit", "optimizer.lr=1e-2"],
    "float8 optimizer": ["optimizer=torchao.optim.AdamWFp8", "optimizer.lr=1e-2"],
    "stochastic": ["dtype=bf16", "weight_update=stochastic"],
    "fp32 master": ["dtype=bf16", "weight_update=fp32_master"],
    "lora": LORA,
    "qlora": [*LORA, "adapter.quantize_base=true"],
    "compiled": ["compile=true"],
    "int8 teacher": ["teacher_quantization=int8"],
    "own base": ["~teacher_model", "teacher=kdtune.teachers.BaseOfStudent"],
}
# Pairs of which neither says the other is refused, and what the error says.
REFUSED = {
    frozenset(
        {"in backward", "accumulation"}
    ): "optimizer_in_backward=true, gradient_accumulation_steps=2: a weight is updated",
    frozenset(
        {"in backward", "micro-batches by tokens"}
    ): "optimizer_in_backward=true, tokens_per_micro_batch=64: it may cut",
    frozenset({"in backward", "clipping"}): "optimizer_in_backward=true, clip_grad_norm=100.0: the norm is known only",
    frozenset({"int8 teacher", "own base"}): "teacher_quantization: has no effect beside teacher",
    frozenset({"offloading", "compiled"}): "activation_offloading=true, compile=true: a compiled layer",
}
# They set the same key.
ALIKE = [
    {"full checkpointing", "selective checkpointing", "every second layer"},
    {"lora", "qlora"},
    {"8-bit optimizer", "4-bit optimizer", "float8 optimizer"},
    {"stochastic", "fp32 master"},
]
# What changes the numbers: the run to compare a pair with has these alone.
CHANGES = (
    "lora",
    "qlora",
    "int8 teacher",
    "own base",
    "8-bit optimizer",
    "4-bit optimizer",
    "float8 optimizer",
    "stochastic",
    "fp32 master",
)
IN_BF16 = {"stochastic", "fp32 master"}
QUICK = [("full checkpointing", "in backward"), ("selective checkpointing", "lora"), ("in backward", "accumulation"),
         ("in backward", "clipping"), ("in backward", "micro-batches by tokens"), ("offloading", "in backward")]  # fmt: skip
PAIRS = [pair for pair in combinations(OPTIONS, 2) if not any(set(pair) <= group for group in ALIKE)]


@pytest.fixture(scope="module")
def losses(cli: CLI, tmp_path_factory: pytest.TempPathFactory):
    """The losses of two steps with some of the options, each set of them run once; an error is its text."""
    found: dict[tuple[str, ...], list[float] | str] = {}

    def of(names: tuple[str, ...]) -> list[float] | str:
        if names not in found:
            folder = tmp_path_factory.mktemp("run") / "out"
            settings = [setting for name in names for setting in OPTIONS[name]]
            # torchao compiles its optimizers' step for each shape, which takes minutes and does not change what is computed.
            is_compiled = "compiled" in names
            torch._dynamo.reset()  # it compiles a function only so many times in one process
            with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(disable=not is_compiled):
                patch.setenv("TORCHDYNAMO_DISABLE", "0" if is_compiled else "1")
                done = cli(*RUN, *settings, f"output_dir={folder}")
            rows = [] if done.code else map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
            found[names] = done.err if done.code else [row["loss"] for row in rows if "loss" in row]
            assert done.code in (0, 2) and (done.code == 0 or not folder.exists()), done.err
        return found[names]

    return of


@pytest.mark.parametrize(
    "pair",
    [pytest.param(pair, id=" and ".join(pair), marks=[] if pair in QUICK else
     [pytest.mark.slow("a run for each of some hundred pairs, some of which are compiled; a few are quick")]) for pair in PAIRS],
)  # fmt: skip
def test_each_pair_trains_as_without_it_or_is_refused(pair: tuple[str, str], losses) -> None:
    found = losses(pair)
    if frozenset(pair) in REFUSED:
        assert REFUSED[frozenset(pair)] in found
    elif "own base" in pair and not {"lora", "qlora"} & set(pair):
        assert "the student without its adapters, and it has none" in found
    elif "offloading" in pair:
        assert "activation_offloading=true: needs a CUDA device" in found
    else:
        expected = losses(tuple(name for name in pair if name in CHANGES))
        # Gradients are added up in the weights' dtype, and torch's compiler rounds bf16 less often.
        rounds = set(pair) & IN_BF16 and set(pair) & {"accumulation", "micro-batches by tokens", "compiled"}
        assert found == pytest.approx(expected, rel=1e-3 if rounds else 1e-6), pair
        assert found[1] < found[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["activation_checkpointing=0"], "activation_checkpointing=0: every so many layers, so at least 1"),
        (["activation_checkpointing=some"], "activation_checkpointing:"),
        (["activation_checkpointing=2", "enable_activation_checkpointing=true"], "the first means full"),
        (["activation_offloading=true", "compile=true"], "activation_offloading=true, compile=true"),
    ],
)  # fmt: skip
def test_what_else_is_refused(settings: list[str], message: str, cli: CLI, tmp_path: Path) -> None:
    done = cli(*RUN, *settings, f"output_dir={tmp_path / 'out'}")
    assert done.code == 2 and message in done.err and not (tmp_path / "out").exists()
