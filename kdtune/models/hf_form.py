"""What kdtune needs to know of a model of the transformers library before its weights are read: parts, names, form of the logits."""

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel, __version__
from transformers.core_model_loading import revert_weight_conversion
from transformers.initialization import no_init_weights

from kdtune.errors import CheckpointError, first_line
from kdtune.log import get_logger
from kdtune.models.architecture import without_layer
from kdtune.models.hf_attention import INSTEAD, INTERFACE, register

log = get_logger(__name__)

# Kinds of layers whose tokens do nothing but attend to others.
_KINDS = {"full_attention", "sliding_attention"}
# What transformers' loader skips in the files of any model.
_SKIPPED = (r"rotary_emb\.inv_freq$",)


@dataclass(frozen=True)
class Form:
    """What kdtune needs to know of a model."""

    ours_by_theirs: Mapping[str, str]
    """Names of the weights in files, by ``{}`` for the layer's number, with the names in `HFModel`."""
    prefix: str
    """What begins the names of all weights but the head's."""
    ignored: tuple[str, ...]
    shapes: Mapping[str, tuple[int, ...]]
    vocab_size: int
    embed_dim: int
    num_layers: int
    attention_dim: int
    max_seq_len: int
    windows: tuple[int, ...]
    ties: bool
    logit_scale: float
    logit_softcap: float | None


def build(document: Mapping[str, Any], folder: str | None, trust_remote_code: bool) -> PreTrainedModel:
    """Return the model of a config.json, on the current default device and dtype; no file is fetched.

    On the meta device only its parameters are there: buffers are computed, for they are in no file.

    Args:
        document: the settings.
        folder: where the model's own code lies, if it has some.
        trust_remote_code: run that code.

    Raises:
        CheckpointError: transformers has no such model, or does not make one of these settings.
    """
    if document.get("quantization_config"):
        raise CheckpointError(
            "config.json: quantization_config: the weights are packed by another library; give the unquantized model"
        )
    _check_own_code(document, trust_remote_code)
    is_meta, dtype = torch.get_default_device().type == "meta", torch.get_default_dtype()
    register()
    try:
        if folder:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
            config.tie_word_embeddings = document.get("tie_word_embeddings", config.tie_word_embeddings)
        else:
            config = CONFIG_MAPPING[document["model_type"]].from_dict(dict(document))
        with suppress(Exception):  # a few want one
            config.pad_token_id = None  # families' defaults may lie beyond the vocabulary
        with _without_weights() if is_meta else nullcontext():
            causal = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, dtype=dtype)
    except Exception as error:
        raise _refusal(
            f"transformers {__version__} makes no causal language model of it: {first_line(error)}"
        ) from error
    for module in causal.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # else it would get no gradient
    causal.tie_weights(recompute_mapping=False)
    if causal._can_set_attn_implementation():
        causal.set_attn_implementation(INTERFACE)
    return causal


def _refusal(what: str) -> CheckpointError:
    return CheckpointError(f"config.json: {what}")


def _check_own_code(document: Mapping[str, Any], trust_remote_code: bool) -> None:
    own = document.get("auto_map") or {}
    if not own and document.get("model_type") not in CONFIG_MAPPING:
        raise _refusal(f"model_type={document.get('model_type')!r}: transformers {__version__} has no such model")
    if own and document.get("model_type") not in CONFIG_MAPPING and not trust_remote_code:
        raise _refusal(
            "auto_map: the model is computed by code in its own folder, which is not run; if you trust that code, write family: "
            "{_component_: kdtune.models.hf_model, trust_remote_code: true}"
        )
    if trust_remote_code and any("--" in str(name) for name in own.values()):
        raise _refusal(
            f"auto_map={own}: the code lies in another repository, and nothing is fetched; download it with the model"
        )


@contextmanager
def _without_weights() -> Iterator[None]:
    """A context in which the modules that are made have no weights, but their buffers."""
    register_parameter = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register_parameter(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        with no_init_weights(), torch.device("cpu"):
            yield
    finally:
        nn.Module.register_parameter = register_parameter  # type: ignore[method-assign]


def form_of(causal: PreTrainedModel) -> Form:
    """Return what kdtune needs to know of a model without weights.

    Raises:
        CheckpointError: kdtune does not compute it, or not its logits; what it is and what is allowed are named.
    """
    parts, settings = parts_of(causal), causal.config
    _check_tokens_apart(causal, parts)
    context = getattr(settings, "max_position_embeddings", None)
    if not isinstance(context, int) or context < 1:
        raise _refusal(f"max_position_embeddings={context}; the length of the context expected")
    state = causal.state_dict()
    if kept := sorted(state.keys() - {name for name, _ in causal.named_parameters(remove_duplicate=False)}):
        raise _refusal(f"the files hold {kept[0]!r}, which is no weight; {INSTEAD}")
    ours = {name: own for name in state if (own := _our_name(name, parts)) is not None}
    if other := [name for name in state if name not in ours]:
        raise _refusal(f"{type(causal).__name__} has {other[0]!r} outside of decoder and output head; {INSTEAD}")
    head: Any = causal.get_submodule(parts["output"])
    embeddings, layers = (causal.get_submodule(parts[name]) for name in ("tok_embeddings", "layers"))
    prefix, buffers = (
        f"{parts['base']}.",
        {name.removeprefix(f"{parts['base']}.") for name, _ in causal.named_buffers()},
    )
    names = _names_in_files(causal, state)
    scale, softcap = _logits_form(causal, parts)
    if dropped := {
        key: value
        for key, value in settings.to_dict().items()
        if re.search("(?<!classifier_)drop", key) and isinstance(value, float) and value
    }:
        log.info("%s: dropout is off, as in all of kdtune's models (config.json: %s)", type(causal).__name__, dropped)
    if causal.config._attn_implementation != INTERFACE:
        log.info(
            "%s: its attention is its own, so documents are padded to the longest of a micro-batch",
            type(causal).__name__,
        )
    return Form(
        ours_by_theirs={without_layer(theirs): without_layer(ours[name]) for theirs, name in names.items()},
        prefix=prefix,
        ignored=(*_SKIPPED, *sorted(getattr(causal, "_keys_to_ignore_on_load_unexpected", None) or ()),
                 *(rf"(^|\.){re.escape(name)}$" for name in sorted(buffers))),
        shapes={ours[name]: tuple(tensor.shape) for name, tensor in state.items()},
        vocab_size=head.out_features,
        embed_dim=head.in_features,
        num_layers=len(list(layers.children())),
        attention_dim=_attention_dim(settings, head.in_features),
        max_seq_len=context,
        windows=(window,) if isinstance(window := getattr(settings, "sliding_window", None), int) else (),
        ties=head.weight is embeddings.weight,
        logit_scale=scale,
        logit_softcap=softcap,
    )  # fmt: skip


def _attention_dim(settings: Any, embed_dim: int) -> int:
    """Return the width of all query heads together, of which a settings object may give the heads' own."""
    num_heads, head_dim = (getattr(settings, name, None) for name in ("num_attention_heads", "head_dim"))
    return num_heads * head_dim if isinstance(num_heads, int) and isinstance(head_dim, int) else embed_dim


def _check_tokens_apart(causal: PreTrainedModel, parts: Mapping[str, str]) -> None:
    """Raise CheckpointError unless documents in one row can be kept apart, and prompts of different lengths in one batch."""
    settings = causal.config
    if getattr(causal, "_is_stateful", False) or getattr(settings, "is_encoder_decoder", False):
        raise _refusal(
            f"{type(causal).__name__} has other layers than attention, or an encoder; want a decoder of attention alone"
        )
    if kinds := set(getattr(settings, "layer_types", None) or ()) - _KINDS:
        raise _refusal(f"layer_types with {sorted(kinds)} is not supported; want {' and '.join(sorted(_KINDS))} alone")
    if moving := _rope_kinds(getattr(settings, "rope_parameters", None)) & {"dynamic", "longrope"}:
        raise _refusal(
            f"rope_type {sorted(moving)}: a token's rotation depends on the longest text of a batch, and documents could not be kept apart"
        )
    taken = inspect.signature(causal.get_submodule(parts["base"]).forward).parameters
    if missing := [name for name in ("position_ids", "past_key_values") if name not in taken]:
        raise _refusal(
            f"{type(causal).__name__} takes no {missing[0]}, without which documents, or prompts of different lengths, cannot be kept apart"
        )


def parts_of(causal: PreTrainedModel) -> dict[str, str]:
    """Return the paths of a model's parts, by the names that they have in `HFModel`."""
    name, path_of = type(causal).__name__, {module: path for path, module in causal.named_modules()}
    head, embeddings = causal.get_output_embeddings(), causal.get_input_embeddings()
    base = getattr(causal, causal.base_model_prefix, None)
    if type(head) is not nn.Linear or head.bias is not None:
        what = (
            "none"
            if head is None
            else f"a {type(head).__name__}{' with a bias' if getattr(head, 'bias', None) is not None else ''}"
        )
        raise _refusal(
            f"{name}: its output head, {path_of.get(head)}, is {what}; want a torch.nn.Linear without bias, as the losses do"
        )
    lists = [
        path for path, module in (base or nn.Module()).named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == getattr(causal.config, "num_hidden_layers", None)
    ]  # fmt: skip
    if not isinstance(base, nn.Module) or not isinstance(embeddings, nn.Embedding) or not lists:
        raise _refusal(
            f"{name}: decoder, embeddings or layers are not where models of transformers have them; {INSTEAD}"
        )
    prefix = path_of[base]
    return {
        "tok_embeddings": path_of[embeddings],
        "layers": f"{prefix}.{lists[0]}",
        "output": path_of[head],
        "base": prefix,
    }


def _rope_kinds(settings: Any) -> set[str]:
    """Return the kinds of rotation in a model's settings, which may have some for each kind of layer."""
    if not isinstance(settings, Mapping):
        return set()
    return {str(settings.get("rope_type"))}.union(*map(_rope_kinds, settings.values()))


def _our_name(name: str, parts: Mapping[str, str]) -> str | None:
    """Return a weight's name in `HFModel`; None if it is in none of the parts."""
    return next((ours + name.removeprefix(path) for ours, path in parts.items() if name.startswith(f"{path}.")), None)


def _names_in_files(causal: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the names in the model of its weights, by their names in files, where they may be older ones."""
    model, found = type(causal).__name__, {id(tensor): name for name, tensor in state.items()}
    try:
        written = revert_weight_conversion(causal, dict(state))
    except (ValueError, TypeError, RuntimeError, KeyError, NotImplementedError) as error:
        raise _refusal(
            f"{model}: transformers {__version__} fails to say how the weights are named in files: {first_line(error)}; {INSTEAD}"
        ) from error
    named = {theirs: found.get(id(tensor)) for theirs, tensor in written.items()}
    if changed := [theirs for theirs, name in named.items() if name is None]:
        raise _refusal(
            f"{model}: transformers joins or splits weights when it reads them, as of mixtures of experts: {changed[0]!r} of the files is "
            f"none of the model's; {INSTEAD}"
        )
    if len(named) != len(state):
        raise _refusal(f"{model}: its {len(state)} weights have {len(named)} names in files; {INSTEAD}")
    return {theirs: name for theirs, name in named.items() if name is not None}


class _Instead(nn.Module):
    """Stands in for a part of a model: returns what it is told, and keeps its first input."""

    def __init__(self, outputs: Any) -> None:
        super().__init__()
        self.outputs: Any = outputs
        self.inputs: Any = None

    def __getattr__(self, name: str) -> Any:
        return self  # such as a decoder within

    def forward(self, inputs: Any = None, *_: Any, **__: Any) -> Any:
        self.inputs = inputs
        return self.outputs


class _Outputs(tuple[Tensor, ...]):
    """Hidden states as a decoder returns them, and nothing else that it might."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        return None


def _logits_form(causal: PreTrainedModel, parts: Mapping[str, str]) -> tuple[float, float | None]:
    """Return factor and soft-cap of the logits, measured: what the model does with known hidden states and products of the head."""
    head: Any = causal.get_submodule(parts["output"])
    base = causal.get_submodule(parts["base"])
    with torch.device("cpu"), torch.no_grad():
        values = torch.tensor([1e9, 1e-3, -4.0, 0.5, 3.0, -1e9], dtype=torch.float64)
        hidden = torch.linspace(0.5, 2.0, head.in_features, dtype=torch.float64).expand(1, 2, -1)
        instead_of_head = _Instead(values.expand(1, 2, -1))
        _replace(causal, parts["output"], instead_of_head)
        _replace(causal, parts["base"], _Instead(_Outputs((hidden,))))
        try:
            logits = causal(input_ids=torch.zeros(1, 2, dtype=torch.int64)).logits[0, 0].double()
            entering = instead_of_head.inputs.double()
        except Exception as error:
            raise _refusal(
                f"{type(causal).__name__}: what it does with its logits cannot be found out: {first_line(error)}; {INSTEAD}"
            ) from error
        finally:
            _replace(causal, parts["output"], head)
            _replace(causal, parts["base"], base)
    before = float(entering.flatten()[0] / hidden.flatten()[0])
    softcap = float(logits[0]) if abs(float(logits[0])) < 1e6 else None
    small = float(logits[1]) if softcap is None else softcap * float(torch.atanh(logits[1] / softcap))
    after = small / float(values[1])
    expected = values * after if softcap is None else softcap * torch.tanh(values * after / softcap)
    if entering.shape != hidden.shape or not (_close(entering, hidden * before) and _close(logits, expected)):
        raise _refusal(
            f"{type(causal).__name__}: it does more with hidden states or logits than to scale and soft-cap them; {INSTEAD}"
        )
    scale = before * after
    return (1.0 if abs(scale - 1) < 1e-6 else scale), softcap


def _close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-5, atol=0.0)


def _replace(module: nn.Module, path: str, by: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    module.get_submodule(parent)._modules[leaf] = by
