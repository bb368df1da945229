"""Products in float8: torchao's modules on a CPU, where torch multiplies float8 too, against the same model without."""

import math

import pytest
import torch
from torch import nn

from kdtune.distributed import Parallelism, fake_world
from kdtune.errors import ConfigError
from kdtune.models import Transformer, apply_lora, llama
from kdtune.models.float8 import apply_float8, float8_problems
from kdtune.parallel import apply_activation_checkpointing, apply_compile, build_model
from kdtune.tensor_types import is_dtensor
from kdtune.training import trainable_parameters
from kdtune.training.in_backward import step_in_backward

SHAPE = {"vocab_size": 96, "embed_dim": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "max_seq_len": 64}
TOKENS = torch.arange(17)[None]  # no multiple of 16: it is padded


def model(recipe: str | None = None, intermediate_dim: int = 128, dtype: torch.dtype = torch.float32) -> Transformer:
    torch.manual_seed(0)
    made = llama(**SHAPE, intermediate_dim=intermediate_dim).to(dtype)
    for parameter in made.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.1)
    if recipe is not None:
        apply_float8(made, recipe)  # type: ignore[arg-type]
    return made


def gradients(student: Transformer) -> list[torch.Tensor]:
    student(TOKENS).float().logsumexp(-1).sum().backward()
    return [parameter.grad for parameter in student.parameters() if parameter.grad is not None]


def kinds(student: Transformer) -> dict[str, str]:
    return {name: type(one).__name__ for name, one in student.named_modules() if isinstance(one, nn.Linear)}


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def test_only_the_layers_linears_of_fitting_sizes_are_converted() -> None:
    found = kinds(model("tensorwise"))
    assert found.pop("output") == "OutputHead" and list(found.values()) == ["Float8Linear"] * 14
    odd = list(kinds(model("tensorwise", intermediate_dim=72)).values())
    assert (odd.count("Linear"), odd.count("Float8Linear")) == (6, 8)
    assert list(model("tensorwise").state_dict()) == list(model().state_dict())


def test_outputs_and_gradients_are_near_those_without() -> None:
    """The relative error of e4m3 numbers, 3 bits of mantissa, is 2.6 % on average, and e5m2's, of gradients, 5 %; they add up."""
    plain, float8 = model(), model("tensorwise")
    assert 0.005 < relative(float8(TOKENS), plain(TOKENS)) < 0.15
    pairs = list(zip(gradients(float8), gradients(plain), strict=True))
    assert all(torch.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.9 for ours, theirs in pairs)
    assert max(relative(ours, theirs) for ours, theirs in pairs) > 0.005


@pytest.mark.parametrize("which", ["full", "selective", 2])
def test_recomputed_it_has_the_same_gradients(which) -> None:
    plain, recomputed = model("tensorwise"), model("tensorwise")
    apply_activation_checkpointing(recomputed, which)
    assert all(torch.equal(one, other) for one, other in zip(gradients(recomputed), gradients(plain), strict=True))


def test_updated_in_backward_it_has_the_same_weights() -> None:
    plain, updated = (model("tensorwise", dtype=torch.bfloat16) for _ in range(2))
    for student in (plain, updated):
        optimizer = torch.optim.AdamW(trainable_parameters(student), lr=1e-2)
        if student is updated:
            step_in_backward(optimizer)
        student(TOKENS).float().logsumexp(-1).sum().backward()
        optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(updated.parameters(), plain.parameters(), strict=True))


@pytest.mark.slow("half a minute of compilation; the same products are in the quick tests")
def test_compiled_it_is_near_too() -> None:
    plain, compiled = model("tensorwise"), model("tensorwise")
    apply_compile(compiled)
    apart = [relative(ours, theirs) for ours, theirs in zip(gradients(compiled), gradients(plain), strict=True)]
    assert max(apart) < 0.1


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_on_the_meta_device_all_recipes_have_the_shapes(recipe: str) -> None:
    with torch.device("meta"):
        student = llama(**SHAPE, intermediate_dim=128).bfloat16()
    apply_float8(student, recipe)  # type: ignore[arg-type]
    student(TOKENS.to("meta")).sum().backward()
    for parameter in student.parameters():
        assert parameter.grad is not None and parameter.grad.shape == parameter.shape


def test_it_is_built_and_steps() -> None:
    student = build_model(lambda: model(), None, dtype=torch.bfloat16, float8_training="tensorwise")
    assert "Float8Linear" in kinds(student).values()
    assert all(math.isfinite(gradient.sum().item()) for gradient in gradients(student))


def test_in_shards_the_weights_are_gathered_in_their_own_dtype() -> None:
    """With collectives that do nothing: FSDP2 takes torchao's modules, and gradients are shards of the weights' dtype."""
    with fake_world(2) as world:
        student = build_model(
            lambda: model(), None, dtype=torch.bfloat16, float8_training="tensorwise", world=world, parallelism=Parallelism()
        )  # fmt: skip
        student(TOKENS).float().sum().backward()
        for name, parameter in student.named_parameters():
            assert is_dtensor(parameter.grad) and parameter.grad.dtype == torch.bfloat16, name
            assert 2 * parameter.grad.to_local().numel() == parameter.numel(), name


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="the model has adapters"):
        apply_float8(apply_lora(model()), "tensorwise")
    with pytest.raises(ConfigError, match="no linear"):
        apply_float8(llama(**SHAPE | {"embed_dim": 24}, intermediate_dim=40), "rowwise")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Card")
    for capability, recipe, dtype, message in [
        ((8, 0), "tensorwise", torch.bfloat16, "needs compute capability 8.9, Card has 8.0; leave it out"),
        ((8, 9), "rowwise", torch.bfloat16, "needs compute capability 9.0, Card has 8.9; use tensorwise"),
        ((9, 0), "rowwise", torch.float32, "its products are in bf16, the model computes in float32"),
        ((9, 0), "tensorwise", torch.float32, None),
        ((9, 0), "rowwise_with_gw_hp", torch.bfloat16, None),
    ]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        found = float8_problems(recipe, torch.device("cuda"), dtype)  # type: ignore[arg-type]
        assert (found == []) if message is None else (message in found[0]), found
    (found,) = float8_problems("rowwise", torch.device("cpu"), torch.bfloat16)
    assert "needs a CUDA device of compute capability 9.0 or newer, not cpu" in found
