"""Adapter folders: written, read back, resumed from, and refused when they do not belong."""

import copy
import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_samples import assert_same_weights, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdtune.checkpoint import (
    Checkpointer,
    CheckpointManager,
    load_adapter,
    load_model,
    load_state,
    newest_step,
    save_model,
    step_folders,
)
from kdtune.errors import CheckpointError, ConfigError
from kdtune.models import Transformer, adapter_parameters, apply_lora, has_adapters, llama, merge_adapters
from kdtune.models.nf4 import is_nf4
from kdtune.parallel import build_model

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 5, 8, 9, 7, 9, 3]])


def adapted(model: Transformer, **settings: Any) -> Transformer:
    """The model with adapters that do something."""
    apply_lora(model, **{"lora_rank": 4, "apply_lora_to_output": True, **settings})
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def on_meta(folder: Path, **settings: Any) -> Transformer:
    with torch.device("meta"):
        model = Transformer(Checkpointer(folder).model_config())
        return apply_lora(model, **{"lora_rank": 4, "apply_lora_to_output": True, **settings})


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    save_model(tiny_model(), folder)
    (folder / "LICENSE.txt").write_text("terms")
    return folder


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    save_model(adapted(load_model(base)), tmp_path / "adapter", base=base, save_weights="adapter")
    return tmp_path / "adapter"


def same_adapters(found: Transformer, expected: Transformer) -> bool:
    theirs, ours = adapter_parameters(found), adapter_parameters(expected)
    return theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"quantize_base": True, "apply_lora_to_output": False}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_come_back_bit_for_bit(
    base: Path, tmp_path: Path, settings: dict[str, Any], dtype: torch.dtype
) -> None:
    model = adapted(load_model(base, dtype=dtype), **settings)
    save_model(model, tmp_path / "out", base=base, save_weights="adapter")
    loaded = Checkpointer(base, adapter_dir=tmp_path / "out").load(on_meta(base, **settings), dtype=dtype)
    assert same_adapters(loaded, model)
    assert torch.equal(loaded(TOKENS), model(TOKENS))
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == set(adapter_parameters(model))


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_adapter_is_merged_into_a_model_without(base: Path, tmp_path: Path, use_dora: bool) -> None:
    model = adapted(load_model(base), use_dora=use_dora)
    save_model(model, tmp_path / "out", base=base, save_weights="adapter")
    loaded = Checkpointer(base, adapter_dir=tmp_path / "out").load()
    assert not has_adapters(loaded) and not loaded.config.tie_embeddings
    assert_same_weights(loaded, merge_adapters(model))
    assert_same_weights(load_adapter(load_model(base), tmp_path / "out"), model)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"quantize_base": True}])
def test_saving_both(base: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    model = adapted(load_model(base), **settings)
    before = copy.deepcopy(model)
    save_model(model, tmp_path / "final", base=base, save_weights="both")
    assert same_adapters(model, before) and torch.equal(model(TOKENS), before(TOKENS)) and model.config == before.config
    whole = load_model(tmp_path / "final")
    assert_same_weights(whole, merge_adapters(model))
    document = json.loads((tmp_path / "final" / "config.json").read_text())
    assert document["tie_word_embeddings"] is False
    for folder in (tmp_path / "final", tmp_path / "final" / "adapter"):
        assert (folder / "LICENSE.txt").read_text() == "terms"
    assert json.loads((tmp_path / "final" / "adapter" / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "inference_mode": True,
        "target_modules": ["down_proj", "gate_proj", "lm_head", "o_proj", "q_proj", "up_proj", "v_proj"],
        "r": 4,
        "lora_alpha": 16,
        "lora_dropout": 0.0,
        "use_dora": settings.get("use_dora", False),
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }


def test_large_merged_models_are_cut_into_files(base: Path, tmp_path: Path) -> None:
    model = adapted(load_model(base))
    save_model(model, tmp_path / "out", max_shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert_same_weights(load_model(tmp_path / "out"), merge_adapters(model))


def test_only_the_adapter_needs_adapters(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='save_weights="adapter": the model has no adapters'):
        save_model(tiny_model(), tmp_path / "out", save_weights="adapter")
    save_model(tiny_model(), tmp_path / "out", save_weights="both")
    assert not (tmp_path / "out" / "adapter").exists()
    assert_same_weights(load_model(tmp_path / "out"), tiny_model())


@pytest.mark.parametrize("use_dora", [False, True])
def test_loading_the_base_draws_the_adapters(base: Path, use_dora: bool) -> None:
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(Checkpointer(base).load(on_meta(base, use_dora=use_dora)))
    torch.testing.assert_close(models[0](TOKENS), load_model(base)(TOKENS), rtol=0, atol=1e-5)
    assert same_adapters(models[0], models[1]) and not same_adapters(models[0], models[2])
    assert models[0].output.weight is models[0].tok_embeddings.weight
    if use_dora:
        linear = models[0].layers[0].mlp.up_proj
        torch.testing.assert_close(linear.magnitude, linear.weight.norm(dim=1))


def test_magnitudes_are_those_of_the_loaded_base(base: Path) -> None:
    """Not of the weights that the model had before, when it was built with some."""
    model = apply_lora(tiny_model(seed=9), use_dora=True)
    Checkpointer(base).load(model)
    torch.testing.assert_close(model(TOKENS), load_model(base)(TOKENS), rtol=0, atol=1e-5)


def test_a_base_is_quantized_as_it_is_read(base: Path) -> None:
    loaded = Checkpointer(base).load(on_meta(base, quantize_base=True), dtype=torch.bfloat16)
    expected = apply_lora(load_model(base, dtype=torch.bfloat16), quantize_base=True)
    weight = loaded.layers[1].mlp.down_proj.weight
    assert is_nf4(weight) and weight.dtype == torch.bfloat16
    assert torch.equal(loaded(TOKENS), expected(TOKENS))
    again = Checkpointer(base).load(loaded, dtype=torch.bfloat16)
    assert torch.equal(again(TOKENS), expected(TOKENS))


LORA = partial(apply_lora, lora_rank=4, apply_lora_to_output=True)


def train(model: Transformer, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = model(TOKENS).logsumexp(-1).mean() + torch.rand(()) * 1e-3
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"quantize_base": True}, {"lora_dropout": 0.3}])
@pytest.mark.parametrize("on_disk", [True, False])
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(
    base: Path, tmp_path: Path, settings: dict[str, Any], on_disk: bool
) -> None:
    sizes = {"vocab_size": 96, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "intermediate_dim": 64}
    builder = None if on_disk else partial(llama, **sizes, tie_embeddings=True)
    source = Checkpointer(base) if on_disk else None

    def start(weights: Path | None = None) -> tuple[Transformer, torch.optim.Optimizer]:
        torch.manual_seed(3)
        model = build_model(builder, source, adapter=partial(LORA, **settings), dtype=torch.float32, weights=weights)
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    model, optimizer = start()
    train(model, optimizer, 2)
    manager = CheckpointManager(tmp_path / "run", keep_last_n=1)
    for step in (1, 2):
        manager.save(step, model=model, optimizer=optimizer, extra={}, metrics={"loss": 1.0}, base=base)
    expected = train(model, optimizer, 3)

    folder = newest_step(tmp_path / "run")
    assert folder is not None and step_folders(tmp_path / "run") == [folder] and folder.name == "step_2"
    assert not (folder / "model.safetensors").exists()
    random.seed(0)
    resumed, optimizer = start(folder)
    load_state(folder / "state", model=resumed, optimizer=optimizer)
    assert train(resumed, optimizer, 3) == expected
    assert same_adapters(resumed, model)


def test_a_step_without_its_weights_is_not_whole(base: Path, tmp_path: Path) -> None:
    model = adapted(load_model(base))
    optimizer = torch.optim.SGD(adapter_parameters(model).values(), lr=0.1)
    folder = CheckpointManager(tmp_path).save(1, model=model, optimizer=optimizer, extra={}, metrics={})
    assert step_folders(tmp_path) == [folder]
    (folder / "adapter_model.safetensors").unlink()
    assert step_folders(tmp_path) == []


def test_a_whole_model_does_not_resume_an_adapter(base: Path) -> None:
    with pytest.raises(CheckpointError, match="holds a whole model, an adapter expected"):
        build_model(None, None, adapter=LORA, dtype=torch.float32, weights=base)


def edit_config(**values: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_config.json"
        document = json.loads(path.read_text()) | values
        path.write_text(json.dumps({key: value for key, value in document.items() if value != "removed"}))

    return edit


def edit_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return edit


Q = "base_model.model.model.layers.0.self_attn.q_proj"


def cut_off(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def as_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


BAD = {
    "cut off": (cut_off, ["adapter_model.safetensors", "not a whole safetensors file"]),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), ["adapter_model.safetensors: missing"]),
    "pickle": (as_pickle, ["adapter_model.safetensors: missing", "adapter_model.bin is a pickle"]),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), ["adapter_config.json: missing"]),
    "no json": (lambda folder: (folder / "adapter_config.json").write_text("{"), ["adapter_config.json", "is not JSON"]),
    "other method": (edit_config(peft_type="IA3"), ["peft_type='IA3' is not supported", "'LORA'"]),
    "no method": (edit_config(peft_type="removed"), ["peft_type is missing"]),
    "other task": (edit_config(task_type="SEQ_CLS"), ["task_type='SEQ_CLS'", "CAUSAL_LM"]),
    "biases": (edit_config(bias="all"), ["bias='all' is not supported", "'none'"]),
    "saved modules": (edit_config(modules_to_save=["lm_head"]), ["modules_to_save=['lm_head'] is not supported"]),
    "changed base": (edit_config(init_lora_weights="pissa"), ["init_lora_weights='pissa' is not supported"]),
    "future field": (edit_config(use_magic=True), ["use_magic=True is not supported"]),
    "turned": (edit_config(fan_in_fan_out=True), ["fan_in_fan_out=True is not supported"]),
    "no rank": (edit_config(r="removed"), ["r=None; a whole number of 1 or more expected"]),
    "text as alpha": (edit_config(lora_alpha="16"), ["lora_alpha='16'; a number expected"]),
    "no number as alpha": (edit_config(lora_alpha=float("inf")), ["lora_alpha=inf; a number expected"]),
    "a number as modules": (edit_config(target_modules=7), ["target_modules=7; names of modules or a regular expression"]),
    "numbers as modules": (edit_config(target_modules=[7]), ["target_modules=[7]; names of modules"]),
    "no expression": (edit_config(target_modules="(q_proj"), ["target_modules='(q_proj'; names of modules"]),
    "excluded by a number": (edit_config(exclude_modules=1.5), ["exclude_modules=1.5; names of modules"]),
    "a list of alphas": (edit_config(alpha_pattern=["q_proj"]), ["alpha_pattern=['q_proj']; numbers by regular"]),
    "no rank by pattern": (edit_config(rank_pattern={"q_proj": "4"}), ["rank_pattern={'q_proj': '4'}; whole numbers by"]),
    "endless expression": (edit_config(target_modules="(.|.)+[0-9]"), ["expression '(.|.)+[0-9]' takes more than", "list the"]),
    "endless exception": (edit_config(exclude_modules="(.|.)+[0-9]"), ["expression '(.|.)+[0-9]' takes more than"]),
    "endless pattern": (edit_config(alpha_pattern={"(.|.)+[0-9]": 4}), ["(.|.)+[0-9]", "takes more than"]),
    "bad pattern": (edit_config(rank_pattern={"*": 4}), ["rank_pattern={'*': 4}; whole numbers by"]),
    "layers by name": (edit_config(layers_to_transform="0"), ["layers_to_transform='0'; numbers of layers"]),
    "rank mismatch": (edit_config(r=8), ["lora_A.weight", "shape [4, 32] found, rank 8"]),
    "dora without magnitudes": (edit_config(use_dora=True), ["lora_magnitude_vector' missing", "use_dora=True"]),
    "half a pair": (
        edit_tensors(lambda tensors: tensors.pop(f"{Q}.lora_B.weight")),
        [f"tensor '{Q}.lora_B.weight' missing"],
    ),
    "lost module": (
        edit_tensors(lambda tensors: [tensors.pop(f"{Q}.lora_{part}.weight") for part in "AB"]),
        [f"tensor '{Q}.lora_A.weight' missing", "target_modules"],
    ),
    "unknown tensor": (
        edit_tensors(lambda tensors: tensors.update({"base_model.model.vision.lora_A.weight": torch.ones(4, 32)})),
        ["tensor 'base_model.model.vision.lora_A.weight': unexpected"],
    ),
    "more layers": (
        edit_tensors(
            lambda tensors: tensors.update(
                {f"{Q}.lora_{part}.weight".replace("layers.0", "layers.7"): torch.ones(*shape)
                 for part, shape in (("A", (4, 32)), ("B", (32, 4)))}
            )
        ),
        ["layers.7.self_attn.q_proj.lora_A.weight", "no such module; it has 2 layers", "another base"],
    ),
    "other width": (
        edit_tensors(lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.ones(4, 48)})),
        [f"{Q}.lora_A.weight", "shape [4, 48] found, [4, 32] expected", "another base"],
    ),
    "whole numbers": (
        edit_tensors(lambda tensors: tensors.update({f"{Q}.lora_A.weight": torch.ones(4, 32, dtype=torch.int32)})),
        ["int32 found"],
    ),
    "empty": (edit_tensors(lambda tensors: tensors.clear()), ["holds no adapter tensors"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_folders_are_refused_before_weights_are_read(
    base: Path, adapter: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, expected = BAD[case]
    spoil(adapter)
    monkeypatch.setattr("kdtune.checkpoint.peft_config._LONGEST_MATCH_S", 0.02)
    checkpointer = Checkpointer(base, adapter_dir=adapter)
    (problem,) = checkpointer.problems()
    for part in (*expected, str(adapter)):
        assert part in problem
    monkeypatch.setattr("kdtune.checkpoint.checkpointer.fill_model", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(CheckpointError) as caught:
        checkpointer.load()
    assert str(caught.value) == problem


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_rank": 8}, r"rank 4 found \(layers.0.attn.q_proj\), lora_rank=8 expected"),
        ({"lora_alpha": 32}, r"scaling 4 found \(layers.0.attn.q_proj\), lora_alpha / lora_rank = 8 expected"),
        ({"use_dora": True}, "use_dora=False found, use_dora=True expected"),
        ({"apply_lora_to_mlp": False}, "adapts other modules than the model"),
        ({"lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"]}, "'layers.0.attn.k_proj': the model's"),
    ],
)
def test_adapters_of_other_settings_are_refused(
    base: Path, adapter: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpointer(base, adapter_dir=adapter).load(on_meta(base, **settings))
    assert str(adapter) in str(caught.value)


def test_adapters_of_another_base_are_refused(adapter: Path, tmp_path: Path) -> None:
    for name, other in (
        ("deeper", tiny_model(layers=3)),
        ("shallower", tiny_model(layers=1)),
        ("words", tiny_model(vocab=97)),
    ):
        save_model(other, tmp_path / name)
        (problem,) = Checkpointer(tmp_path / name, adapter_dir=adapter).problems()
        assert "another base" in problem and str(adapter) in problem


def test_an_adapter_folder_is_not_a_model(adapter: Path, base: Path, tmp_path: Path) -> None:
    (problem,) = Checkpointer(adapter).problems()
    assert "holds an adapter, not a model" in problem
    assert "as checkpoint_dir" in problem and "as adapter_dir" in problem
    (problem,) = Checkpointer(base, adapter_dir=base).problems()
    assert "adapter_config.json: missing" in problem and "whole model" in problem
    (problem,) = Checkpointer(base, adapter_dir=tmp_path / "nowhere").problems()
    assert "nowhere: no such folder" in problem


def test_stored_copies_of_the_base_must_be_the_bases(base: Path, adapter: Path) -> None:
    """PEFT stores the head's own weight beside an adapter on it."""
    name = "base_model.model.lm_head.base_layer.weight"
    head = load_model(base).output.weight.detach().clone()
    expected = Checkpointer(base, adapter_dir=adapter).load()
    edit_tensors(lambda tensors: tensors.update({name: head}))(adapter)
    assert_same_weights(Checkpointer(base, adapter_dir=adapter).load(), expected)
    edit_tensors(lambda tensors: tensors.update({name: head + 0.1}))(adapter)
    with pytest.raises(CheckpointError, match=r"lm_head\.base_layer\.weight.*differs from the base's own"):
        Checkpointer(base, adapter_dir=adapter).load()
