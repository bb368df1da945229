"""One process and several give the same numbers: gradients in float64, and whole runs of the recipes in fp32."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_runs import ADAPTERS, COPY, FINETUNE, KD, PLAIN, check_same_change, check_same_rows, rows
from safetensors.torch import load_file
from torch import distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

from kdtune import distributed, losses, parallel, training
from kdtune.distributed import full_tensor as whole_tensor
from kdtune.distributed import to_local
from kdtune.generation import slots
from kdtune.models import Transformer, apply_lora, llama
from kdtune.tokenizers import byte_tokenizer

LAYOUTS = {
    "1x4": (1, 4, []),
    "2x2": (2, 2, ["parallelism.reshard_after_forward=false"]),
    "4x1": (4, 1, []),
    "4x1, HSDP 2x2, the teacher a copy on each": (
        4,
        1,
        ["parallelism.dp_replicate=2", "enable_activation_checkpointing=true", *COPY],
    ),
    "TP 2, the teacher too": (2, 4, ["parallelism.tp=2"]),
    "FSDP 2 x TP 2, the teacher in FSDP 4": (
        4,
        2,
        [
            "parallelism.tp=2",
            "enable_activation_checkpointing=true",
            "teacher_parallelism=kdtune.distributed.Parallelism",
        ],
    ),
}


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["1x4", "2x2"], id="2 processes"),
        pytest.param(
            list(LAYOUTS), id="every layout", marks=pytest.mark.slow("17 processes, four at a time on two cores")
        ),
    ],
)
@pytest.mark.parametrize(
    ("recipe", "kind"),
    [
        *(
            pytest.param(
                KD, kind, id=f"kd-{kind}", marks=[] if kind != "dora" else pytest.mark.slow("QDoRA has its numbers too")
            )
            for kind in ADAPTERS
        ),
        *(
            pytest.param(
                FINETUNE, kind, id=f"finetune-{kind}", marks=pytest.mark.slow("the student's part of the same steps")
            )
            for kind in ("full", "lora", "dora", "qdora")
        ),
    ],
)
def test_however_a_step_is_cut(
    recipe: list[str], kind: str, names: list[str], launch, small_model: Path, tmp_path: Path
) -> None:
    base = f"checkpointer={{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: {small_model}}}"
    for name in names:
        ranks, accumulation, layout = LAYOUTS[name]
        own = [one for one in layout if recipe is KD or not one.startswith("teacher")]
        if kind == "qdora" and "TP" in name:
            continue
        ended = launch.kdtune(
            *recipe, *PLAIN, *ADAPTERS[kind], *own, base, f"gradient_accumulation_steps={accumulation}",
            f"output_dir={tmp_path / name}", ranks=ranks,
        )  # fmt: skip
        assert [rank.code for rank in ended] == [0] * ranks, ended[0].text
        assert not any(rank.text for rank in ended[1:]), ended[1].text
        check_same_rows(rows(tmp_path / name), rows(tmp_path / "1x4"))
        ours, theirs = (rows(tmp_path / folder)[-1]["total_flops"] for folder in (name, "1x4"))
        assert ours == pytest.approx(theirs, rel=1e-5)
        check_same_change(tmp_path / name / "final", tmp_path / "1x4" / "final", small_model)
    trained = [row for row in rows(tmp_path / "1x4") if "loss" in row]
    assert len(trained) == 5 and trained[-1]["loss"] < trained[0]["loss"] - 0.01
    assert max(row["grad_norm"] for row in trained) > 0.05


@pytest.mark.parametrize(
    "other",
    [
        "4x1, HSDP 2x2, the teacher a copy on each",
        "2x2, cut by tokens",
        pytest.param(
            "FSDP 2 x TP 2, the teacher in FSDP 4", marks=pytest.mark.slow("four processes on two cores once more")
        ),
    ],
)
def test_a_last_step_that_is_shorter_and_ranks_without_a_batch(other: str, launch, tmp_path: Path) -> None:
    """21 examples are 11 batches: the last of 3 steps has 3 for 4 processes, and validation 5 for 4."""
    short = ["dataset.split=train[:21]", "max_steps_per_epoch=null", "epochs=2"]
    by_tokens = (2, 2, ["tokens_per_micro_batch=200"])  # dropout would draw otherwise: not among LAYOUTS
    for name in ("1x4", other):
        ranks, accumulation, layout = LAYOUTS.get(name, by_tokens)
        ended = launch.kdtune(
            *KD, *PLAIN, *short, *layout, f"gradient_accumulation_steps={accumulation}", f"output_dir={tmp_path / name}",
            ranks=ranks,
        )  # fmt: skip
        assert [rank.code for rank in ended] == [0] * ranks, ended[0].text
        check_same_rows(rows(tmp_path / name), rows(tmp_path / "1x4"))
    assert [row["epoch"] for row in rows(tmp_path / "1x4") if "epoch" in row] == [0, 0, 0, 1, 1, 1]


def float64_model(kind: str, *, tied: bool) -> Transformer:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    model = llama(vocab_size=64, embed_dim=32, num_layers=2, num_heads=8, num_kv_heads=4, intermediate_dim=64, max_seq_len=64,
                  tie_embeddings=tied)  # fmt: skip
    kind, _, switched = kind.partition(", ")
    if switched:
        switches: dict[str, Any] = {"qkv_bias": True, "qk_norm": "head", "logit_softcap": 5.0, "windows": (4, None)}
        switches |= {"norm_placement": "both", "norm_offset": 1.0, "activation": "gelu_tanh", "window_rope_base": 30.0}
        if switched == "norms after":
            switches = {
                "qk_norm": "projection",
                "norm_placement": "after",
                "norm_rounds_last": True,
                "attention_scale": 0.3,
            }
            switches |= {"residual_scale": 0.5, "embedding_scale": 3.0, "logit_divisor": 2.0, "rotates": (True, False)}
        model = Transformer(replace(model.config, **switches))
    with torch.no_grad():
        for parameter in model.parameters():
            if switched and parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) / 2)
            parameter.mul_(5 if parameter.ndim > 1 else 1)
    if kind != "full":
        model = apply_lora(model, lora_rank=4, use_dora=kind == "dora", apply_lora_to_output=True)
        for name, parameter in model.named_parameters():
            if "lora_b" in name:
                torch.nn.init.normal_(parameter)
    return model


def compare_gradients(kind: str, tied: bool, replicate: int, tp: int = 1, teacher_tp: int = 1) -> None:
    """Gradients and norm of two micro-batches a process, against all of them at once in one unsharded model."""
    student, teacher, whole = (
        float64_model(kind, tied=tied),
        float64_model("full", tied=True),
        float64_model(kind, tied=tied),
    )
    teacher.requires_grad_(False)
    kd_loss = losses.KDLoss(losses.ForwardKLLoss(), kd_ratio=0.5)
    torch.manual_seed(1)
    tokens, labels = torch.randint(64, (16, 12)), torch.randint(64, (16, 12))
    labels[0], labels[5:8] = -100, -100
    num_valid_tokens = (labels != -100).sum()

    def backward(model: Transformer, part: slice) -> None:
        signal = losses.HiddenSignal(teacher(tokens[part], return_hidden=True), teacher.output)
        total, _ = kd_loss(model(tokens[part], return_hidden=True), model.output, signal, labels[part])
        (total / num_valid_tokens).backward()

    backward(whole, slice(0, 16))
    norm = training.clip_grad_norm_(whole.parameters(), 1e-3)
    parallelism = distributed.Parallelism(dp_replicate=replicate, tp=tp)
    with parallelism.start_world(torch.device("cpu")) as world:
        parallel.shard_model(student, parallelism, world)
        parallel.shard_model(teacher, distributed.Parallelism(tp=teacher_tp), world)
        share = 16 // world.dp_size
        for half in range(2):
            start = world.dp_rank * share + half * share // 2
            backward(student, slice(start, start + share // 2))
        assert training.clip_grad_norm_(student.parameters(), 1e-3).item() == pytest.approx(norm.item(), rel=1e-12)
        expected = dict(whole.named_parameters())
        for name, parameter in student.named_parameters():
            if parameter.grad is None:
                assert expected[name].grad is None
            else:
                # By NumPy's rule: 1e-9 of the largest entry, as a rounding error goes with the sums.
                torch.testing.assert_close(whole_tensor(parameter.grad), expected[name].grad, rtol=1e-9,
                                           atol=1e-9 * expected[name].grad.abs().max().item())  # fmt: skip
        assert all(
            to_local(parameter).numel() < parameter.numel()
            for name, parameter in student.named_parameters()
            if name.endswith("proj.weight")
        )
        dist.barrier()


@pytest.mark.parametrize(
    ("kind", "tied", "replicate"),
    [("full", True, 2), ("full", False, 1), ("lora", True, 1), ("dora", False, 2), ("full, switched", False, 1)],
)
def test_gradients_in_float64(kind: str, tied: bool, replicate: int, launch) -> None:
    launch.call(compare_gradients, kind, tied, replicate, ranks=4)


EVERY_KIND, FULL_ALONE = [(2, 1, 2, 2), (4, 2, 2, 2)], [(4, 1, 2, 1), (4, 1, 4, 4)]
MORE = pytest.mark.slow(
    "four processes on two cores; full weights are cut like this, and adapters in other ways, in the quick tests"
)


@pytest.mark.parametrize(
    ("kind", "ranks", "replicate", "tp", "teacher_tp"),
    [
        *(pytest.param(kind, *layout) for kind in ("full", "lora", "dora") for layout in EVERY_KIND),
        *(pytest.param("full", *layout) for layout in FULL_ALONE),
        *(pytest.param(f"{kind}, switched", *EVERY_KIND[0]) for kind in ("full", "dora")),
        pytest.param("full, norms after", *EVERY_KIND[0]),
        pytest.param("lora, norms after", *EVERY_KIND[0], marks=MORE),
        *(pytest.param(kind, *layout, marks=MORE) for kind in ("lora", "dora") for layout in FULL_ALONE),
    ],
)
def test_gradients_under_tensor_parallelism(
    kind: str, ranks: int, replicate: int, tp: int, teacher_tp: int, launch
) -> None:
    launch.call(compare_gradients, kind, kind != "dora", replicate, tp, teacher_tp, ranks=ranks)


def count_sums() -> None:
    """Two sums a layer in forward, two in backward, and one for the embeddings in forward."""
    model = float64_model("full", tied=True)
    parallelism = distributed.Parallelism(tp=2)
    with parallelism.start_world(torch.device("cpu")) as world:
        parallel.shard_model(model, parallelism, world)
        with CommDebugMode() as forward:
            hidden = model(torch.zeros(2, 8, dtype=torch.int64), return_hidden=True)
        with CommDebugMode() as backward:
            hidden.sum().backward()
        layers = len(model.layers)
        assert (forward.get_total_counts(), backward.get_total_counts()) == (2 * layers + 1, 2 * layers)
        dist.barrier()


def test_tensor_parallelism_sums_as_often_as_it_must(launch) -> None:
    launch.call(count_sums, ranks=2)


def test_samples_and_bf16_arithmetic_beside_fp32_weights(launch, tmp_path: Path) -> None:
    """Answers come from all processes together, also where no validation has made the root whole before."""
    out = tmp_path / "out"
    ended = launch.kdtune(
        *KD, "parallelism.param_dtype=bf16", "dataset_val=null", "run_val_every_n_steps=null", "sample_every_n_steps=2",
        "max_steps_per_epoch=4", f"output_dir={out}", ranks=2,
    )  # fmt: skip
    assert [rank.code for rank in ended] == [0, 0], ended[0].text
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert [(row["step"], row["model"]) for row in samples] == [
        (0, "student"),
        (0, "teacher"),
        (2, "student"),
        (4, "student"),
    ]
    assert {tensor.dtype for tensor in load_file(out / "final" / "model.safetensors").values()} == {torch.float32}


def test_an_answer_ends_on_all_processes_at_once(launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that drew another token than the first, here the one that ends the text, goes on with it in step."""
    sample_tokens = slots.sample_tokens

    def stops_elsewhere(*arguments: object, **settings: object) -> list[int]:
        tokens = sample_tokens(*arguments, **settings)
        return tokens if os.environ["RANK"] == "0" else [next(iter(byte_tokenizer().stop_ids))] * len(tokens)

    monkeypatch.setattr(slots, "sample_tokens", stops_elsewhere)
    run = [*KD, "~lr_scheduler", "max_steps_per_epoch=1", "sample_max_new_tokens=4", "parallelism.timeout_minutes=0.2",
           "dataset_val=null", "run_val_every_n_steps=null"]  # fmt: skip
    for name, ranks, layout in (("sharded", 2, []), ("apart", 3, ["teacher_processes=1"])):
        ended = launch.kdtune(*run, *layout, f"output_dir={tmp_path / name}", ranks=ranks)
        assert [rank.code for rank in ended] == [0] * ranks, ended[0].text


def test_a_tied_head_with_an_adapter_is_not_merged_into_shards(launch, small_model: Path, tmp_path: Path) -> None:
    """It would be lost: FSDP goes on to share the weight."""
    adapter = ["adapter=kdtune.models.apply_lora", "adapter.apply_lora_to_output=true", "save_weights=adapter"]
    base = f"checkpoint_dir: {small_model}"
    node = "{_component_: kdtune.checkpoint.Checkpointer, "
    ended = launch.kdtune(
        *FINETUNE, *PLAIN, *adapter, "max_steps_per_epoch=1", f"checkpointer={node}{base}}}", f"output_dir={tmp_path / 'made'}",
        ranks=1,
    )  # fmt: skip
    assert ended[0].code == 0, ended[0].text
    ended = launch.kdtune(
        *KD, f"teacher_checkpointer={node}{base}, adapter_dir: {tmp_path / 'made' / 'final'}}}", "teacher_model=null",
        f"output_dir={tmp_path / 'out'}", ranks=2,
    )  # fmt: skip
    assert [rank.code for rank in ended] == [2, 2]
    assert "on several processes such an adapter cannot be merged while loading" in ended[0].text
    assert not (tmp_path / "out").exists()
