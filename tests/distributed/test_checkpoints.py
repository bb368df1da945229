"""What several processes write together is what one process writes; in the background too, and whoever dies or fails meanwhile."""

import json
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from distributed_runs import FINETUNE, KD, check_same_change, check_same_rows, rows
from huggingface_hub import split_torch_state_dict_into_shards
from peft import PeftModel
from safetensors.torch import load, save_file
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM

from kdtune import distributed, parallel
from kdtune._cli.main import main
from kdtune.checkpoint import CheckpointManager, load_adapter, peft, save_model, sharded, step_folders
from kdtune.checkpoint.sharded import tensor_writer
from kdtune.distributed import to_local
from kdtune.models import PHI3, Transformer, adapter_parameters, apply_lora, family_of, llama, merged_weights

SMALL_FILES = 30_000
CPU = torch.device("cpu")
LAYOUTS = {"1": (1, 1), "2": (2, 1), "4": (4, 1), "HSDP 2x2": (4, 2), "4 copies": (4, 4)}
KINDS = {
    "full": (torch.float32, True, {}),
    "full, untied, bf16": (torch.bfloat16, False, {}),
    "lora": (torch.float32, True, {"apply_lora_to_output": True}),
    "dora, bf16": (torch.bfloat16, False, {"use_dora": True}),
    # The files hold q, k and v as one matrix, of which k has no adapter.
    "dora, fused": (torch.float32, True, {"use_dora": True}),
}


def odd_model(kind: str) -> Transformer:
    """No number of rows that 4 processes, or 2, have equal parts of."""
    dtype, tied, adapter = KINDS[kind]
    torch.manual_seed(0)
    model = llama(vocab_size=321, embed_dim=36, num_layers=2, num_heads=6, num_kv_heads=3, intermediate_dim=65, max_seq_len=64,
                  tie_embeddings=tied).to(dtype)  # fmt: skip
    if "fused" in kind:
        model = Transformer(replace(model.config, family=PHI3))
    if kind.startswith("full"):
        return model
    model = apply_lora(model, lora_rank=3, **adapter)
    for name, parameter in model.named_parameters():
        if "lora_b" in name:
            nn.init.normal_(parameter)
    return model


def write_gathered(model: Transformer, folder: Path) -> None:
    """The same files by safetensors itself, every tensor made whole first."""
    keys = family_of(model.config).hf_keys
    parts = {
        keys.from_kdtune(name): distributed.full_tensor(compute()).clone()
        for name, compute in merged_weights(model).items()
    }
    wholes = dict.fromkeys(map(keys.whole_of, parts))
    whole = {name: torch.cat([parts[part] for part in keys.parts_of(name)]) for name in wholes}
    split = split_torch_state_dict_into_shards(
        whole, filename_pattern="model{suffix}.safetensors", max_shard_size=SMALL_FILES
    )
    adapter = {name: distributed.full_tensor(tensor) for name, tensor in peft.peft_tensors(model).items()}
    if dist.get_rank() == 0:
        folder.mkdir()
        for file, names in split.filename_to_tensors.items():
            save_file({name: whole[name] for name in names}, folder / file, metadata={"format": "pt"})
        if adapter:
            (folder / "adapter").mkdir()
            save_file(adapter, folder / "adapter" / peft.WEIGHTS, metadata={"format": "pt"})


def save_together(kind: str, replicate: int, folder: Path) -> None:
    """The model in several small files, and a step folder written at once and one in the background."""
    with distributed.start_world(CPU) as world:
        model = parallel.shard_model(odd_model(kind), distributed.Parallelism(dp_replicate=replicate), world)
        save_model(model, folder / "final", max_shard_bytes=SMALL_FILES, save_weights="both")
        write_gathered(model, folder / "gathered")
        if own := adapter_parameters(model):
            again = parallel.shard_model(odd_model(kind), distributed.Parallelism(dp_replicate=replicate), world)
            for parameter in adapter_parameters(again).values():
                nn.init.zeros_(parameter)
            load_adapter(again, folder / "final" / "adapter")
            read = adapter_parameters(again)
            assert all(torch.equal(to_local(read[name]), to_local(parameter)) for name, parameter in own.items())
        optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
        for name in ("sync", "async"):
            with CheckpointManager(folder / name, async_save=name == "async") as manager:
                manager.save(1, model=model, optimizer=optimizer, extra={}, metrics={})
                for parameter in model.parameters():
                    parameter.data.add_(1 if name == "async" else 0)  # what was staged is no longer what is trained


def model_files(folder: Path) -> dict[str, bytes]:
    """All but the resume state, which has a file a process."""
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*") if "state" not in path.parts
    }


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[] if kind == "dora, bf16" else pytest.mark.slow(
            "15 processes; one kind, with adapters, is in the quick tests"))
        for kind in KINDS
    ],
)  # fmt: skip
def test_folders_are_those_of_one_process(kind: str, launch, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    model = odd_model(kind)
    save_model(model, alone / "final", max_shard_bytes=SMALL_FILES, save_weights="both")
    CheckpointManager(alone / "step").save(
        1, model=model, optimizer=torch.optim.SGD(model.parameters()), extra={}, metrics={}
    )
    expected, expected_step = model_files(alone / "final"), model_files(alone / "step")
    for name, (num_ranks, replicate) in LAYOUTS.items():
        launch.call(save_together, kind, replicate, tmp_path / name, ranks=num_ranks)
        found, gathered = model_files(tmp_path / name / "final"), model_files(tmp_path / name / "gathered")
        assert found.keys() == expected.keys()
        for file in found:
            if file.endswith(".safetensors"):
                assert found[file] == gathered[file], (name, file)
            if kind.startswith("full") or "adapter" in file or not file.endswith(".safetensors"):
                assert found[file] == expected[file], (name, file)
            else:
                # The product of B and A may be rounded otherwise for fewer rows.
                ours, theirs = load(found[file]), load(expected[file])
                assert ours.keys() == theirs.keys()
                for key, tensor in ours.items():
                    torch.testing.assert_close(tensor, theirs[key], msg=f"{name} {key}")
        for way in ("sync", "async"):
            assert model_files(tmp_path / name / way) == expected_step, (name, way)
    assert len(list((alone / "final").glob("model-*.safetensors"))) > 3


def write_other_shards(folder: Path) -> None:
    """Shards that are no stretch of the file: of columns, of two mesh dimensions, of tensor parallelism under FSDP."""
    with distributed.start_world(CPU):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        torch.manual_seed(0)
        placements = {
            "columns": (Replicate(), Shard(1)), "both": (Shard(0), Shard(1)), "both, other way": (Shard(1), Shard(0)),
            "twice": (Shard(0), Shard(0)), "last": (Shard(2), Replicate()), "middle": (Shard(1), Shard(2)),
        }  # fmt: skip
        whole: dict[str, Tensor] = {name: torch.randn(7, 5, 3) for name in placements}
        spread: dict[str, Tensor] = {
            name: distribute_tensor(whole[name], mesh, place) for name, place in placements.items()
        }
        whole["plain"] = spread["plain"] = torch.randn(3)
        whole["scalar"] = spread["scalar"] = torch.randn(())
        whole["sum"] = torch.full((5, 2), 2.0)
        spread["sum"] = DTensor.from_local(torch.ones(5, 2), mesh, [Replicate(), Partial()])
        model = nn.Sequential(nn.Linear(10, 14), nn.Linear(14, 10), nn.LayerNorm(10))
        whole |= {name: tensor.clone() for name, tensor in model.state_dict().items()}
        parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
        spread |= model.state_dict()
        # A matrix of several of ours, each with shards of its own.
        whole["blocks"] = torch.randn(7, 5)
        blocks = [
            distribute_tensor(whole["blocks"][:3], mesh, (Shard(0), Shard(1))),
            distribute_tensor(whole["blocks"][3:], mesh, (Shard(0), Shard(0))),
        ]
        for staged in (False, True):
            tensors = {name: [tensor.detach] for name, tensor in spread.items()}
            tensors["blocks"] = [block.detach for block in blocks]
            like = {**spread, "blocks": whole["blocks"]}
            tensor_writer({f"{staged}.safetensors": tensors}, like, staged=staged)(folder, None)
        if dist.get_rank() == 0:
            save_file(whole, folder / "expected.safetensors", metadata={"format": "pt"})


def test_any_shards_come_to_their_places(launch, tmp_path: Path) -> None:
    launch.call(write_other_shards, tmp_path, ranks=4)
    expected = (tmp_path / "expected.safetensors").read_bytes()
    assert (tmp_path / "False.safetensors").read_bytes() == expected
    assert (tmp_path / "True.safetensors").read_bytes() == expected


def peak_memory() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def save_a_large_one(adapted: bool, folder: Path) -> None:
    with distributed.start_world(CPU) as world:
        with torch.device("meta"):
            model = llama(vocab_size=2**18, embed_dim=64, num_layers=1, num_heads=2, intermediate_dim=64)
            if adapted:
                apply_lora(model, lora_rank=2, apply_lora_to_output=True)
        parallel.shard_model(model, distributed.Parallelism(), world)
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            parameter.data.fill_(1.0)
        save_model(llama(vocab_size=8, embed_dim=4, num_layers=1, num_heads=1, intermediate_dim=4), folder / "small")
        dist.barrier()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = peak_memory()
        save_model(model, folder / "large")
        largest = model.output.weight.numel() * 4
        share = (peak_memory() - before) / largest
        print(f"rank {world.rank}: {share:.2f} of the largest tensor, {largest / 2**20:.0f} MiB", flush=True)
        # A merged shard is a quarter of the tensor, in fp32 twice for a moment.
        assert share < (0.7 if adapted else 0.2)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak from /proc")
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "merged"])
def test_no_process_holds_a_whole_tensor(adapted: bool, launch, tmp_path: Path) -> None:
    launch.call(save_a_large_one, adapted, tmp_path, ranks=4)
    size = (tmp_path / "large" / "model.safetensors").stat().st_size
    assert size > (2 if adapted else 1) * 64 * 2**20


LORA = ["adapter=kdtune.models.apply_lora", "adapter.lora_rank=4", "optimizer.lr=1e-2"]
EVERY_2 = ["batch_size=2", "sample_prompts=[]", "save_every_n_steps=2", "run_val_every_n_steps=null"]
ASYNC = "enable_async_checkpointing=true"


def test_transformers_and_peft_load_what_they_write(launch, small_model: Path, tmp_path: Path) -> None:
    node = f"checkpointer={{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: {small_model}}}"
    run = [*FINETUNE, *LORA, *EVERY_2, node, ASYNC, "max_steps_per_epoch=4"]
    for size in (1, 2):
        out = [f"gradient_accumulation_steps={2 // size}", f"output_dir={tmp_path / str(size)}"]
        ended = launch.kdtune(*run, *out, ranks=size)
        assert [rank.code for rank in ended] == [0] * size, ended[0].text
    one, two = tmp_path / "1", tmp_path / "2"
    check_same_change(two / "final", one / "final", small_model)
    tokens = torch.randint(0, 258, (2, 40), generator=torch.Generator().manual_seed(0))

    def logits(folder: Path, adapter: Path | None = None) -> Tensor:
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
        with torch.no_grad():
            return model.eval()(tokens).logits

    expected = logits(one / "final")
    assert (expected - logits(small_model)).abs().max() > 0.01
    for found in (
        logits(two / "final"),
        logits(small_model, two / "final/adapter"),
        logits(small_model, two / "step_4"),
    ):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


def blocked(monkeypatch: pytest.MonkeyPatch, go: Path) -> None:
    """A disk that writes nothing of a step folder before `go` is there."""
    write_shard = sharded._write_shard

    def slow(path: Path, shard: sharded._Shard) -> None:
        while "step_" in str(path) and not go.exists():
            time.sleep(0.01)
        write_shard(path, shard)

    monkeypatch.setattr(sharded, "_write_shard", slow)


def steps_made(output_dir: Path) -> int:
    metrics = output_dir / "metrics.jsonl"
    return (
        max((json.loads(line)["step"] for line in metrics.read_text().splitlines()), default=0)
        if metrics.exists()
        else 0
    )


def wait_until(condition: Callable[[], bool], started: list) -> None:
    while not condition():
        assert all(rank.process.is_alive() for rank in started), started[0].text
        time.sleep(0.01)


@pytest.mark.parametrize(
    "size", [pytest.param(1, marks=pytest.mark.slow("two whole runs; what two processes do holds for one")), 2]
)
def test_training_goes_on_while_a_folder_is_written(
    size: int, launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = [*KD, "adapter=null", *EVERY_2, "save_every_n_steps=5", f"gradient_accumulation_steps={2 // size}"]
    ended = launch.kdtune(*run, f"output_dir={tmp_path / 'sync'}", ranks=size)
    assert [rank.code for rank in ended] == [0] * size, ended[0].text
    go, out = tmp_path / "go", tmp_path / "out"
    blocked(monkeypatch, go)
    started = launch.start(main, [*run, ASYNC, f"output_dir={out}"], ranks=size)
    wait_until(lambda: steps_made(out) >= 9, started)
    assert not step_folders(out) and len(list(out.glob(".step_5.partial-*"))) == 1
    go.touch()
    ended = launch.wait(started)
    assert [rank.code for rank in ended] == [0] * size, ended[0].text
    assert [folder.name for folder in step_folders(out)] == ["step_5", "step_10"]
    check_same_rows(rows(out), rows(tmp_path / "sync"), tolerance=0)
    for name in ("step_5", "step_10", "final"):
        assert model_files(out / name) == model_files(tmp_path / "sync" / name)


@pytest.mark.slow("six starts of two processes; tests/recipes kills and resumes one")
def test_killed_while_a_folder_is_written(launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process is killed at every stage: no folder is half visible, and the run goes on from the last whole one."""
    run = [*KD, "adapter=null", *EVERY_2, "save_every_n_steps=1", "gradient_accumulation_steps=1", ASYNC]
    ended = launch.kdtune(*run, f"output_dir={tmp_path / 'whole'}", ranks=2)
    assert [rank.code for rank in ended] == [0, 0], ended[0].text
    out, resume = tmp_path / "cut", "resume_from_checkpoint=true"
    with monkeypatch.context() as patch:
        blocked(patch, tmp_path / "never")
        started = launch.start(main, [*run, f"output_dir={out}"], ranks=2)
        wait_until(lambda: bool(list(out.glob(".step_1.partial-*/*.safetensors"))), started)
        for rank in started:
            os.kill(rank.process.pid, signal.SIGKILL)
        launch.wait(started)
        assert not list(out.glob("step_*"))
    moments = random.Random(0)
    for victim in (0, 1, 1):
        made = len(step_folders(out))
        started = launch.start(main, [*run, resume, f"output_dir={out}"], ranks=2)
        wait_until(lambda made=made: len(step_folders(out)) > made, started)
        time.sleep(moments.uniform(0, 0.1))
        os.kill(started[victim].process.pid, signal.SIGKILL)
        ended = launch.wait(started, timeout=60)
        assert all(rank.code for rank in ended), ended[0].text
        assert sorted(path.name for path in out.glob("step_*")) == sorted(folder.name for folder in step_folders(out))
    assert not (out / "final").exists()
    ended = launch.kdtune(*run, resume, f"output_dir={out}", ranks=2)
    assert [rank.code for rank in ended] == [0, 0], ended[0].text
    check_same_rows([row for row in rows(out) if "loss" in row], [row for row in rows(tmp_path / "whole") if "loss" in row],
                    tolerance=0)  # fmt: skip
    assert model_files(out / "final") == model_files(tmp_path / "whole" / "final")
    assert not list(out.glob(".*.partial-*"))


def run_on_a_full_disk(argv: list[str]) -> None:
    """The second process cannot write past the first bytes of a file; a limit on a file's size stands for its full disk."""
    if os.environ["RANK"] == "1":
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    main(argv)


@pytest.mark.parametrize("how", [[], [ASYNC]], ids=["sync", "async"])
def test_a_full_disk_of_one_process_ends_all_with_its_error(how: list[str], launch, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = [*KD, "adapter=null", *EVERY_2, *how, "gradient_accumulation_steps=1", f"output_dir={out}"]
    ended = launch.wait(launch.start(run_on_a_full_disk, run, ranks=2), timeout=60)
    assert [rank.code for rank in ended] == [2, 2], ended[0].text
    said = ended[0].text
    assert f"{out / 'step_2'}: cannot be written: File too large" in said, said
    assert "free space" in said and ".partial-" not in said and "Traceback" not in said
    assert not ended[1].text  # what the first has said
    # The error of what is written in the background comes with the next folder.
    assert steps_made(out) == (4 if how else 2)
    assert sorted(path.name for path in out.iterdir()) == [".lock", "config.yaml", "metrics.jsonl", "run.json"]


def test_a_signal_while_a_folder_is_written(launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is being written is finished, and so is the folder of the step at which the run stops."""
    go, out = tmp_path / "go", tmp_path / "out"
    blocked(monkeypatch, go)
    run = [*KD, "adapter=null", *EVERY_2, "save_every_n_steps=5", "max_steps_per_epoch=60", "dataset.split=train[:480]",
           "gradient_accumulation_steps=1", ASYNC, f"output_dir={out}"]  # fmt: skip
    started = launch.start(main, run, ranks=2)
    wait_until(lambda: steps_made(out) >= 6, started)
    os.kill(started[1].process.pid, signal.SIGTERM)
    go.touch()
    ended = launch.wait(started)
    assert [rank.code for rank in ended] == [0, 0], ended[0].text
    assert "stopped by" in ended[0].text
    stopped = steps_made(out)
    assert step_folders(out)[0].name == "step_5" and step_folders(out)[-1].name == f"step_{stopped}"
    assert 6 <= stopped < 60 and not (out / "final").exists() and not list(out.glob(".*.partial-*"))
