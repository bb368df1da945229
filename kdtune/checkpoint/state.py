"""Resume state: optimizers, schedulers and random number generators. The weights lie beside it, in the model files.

Tensors go through torch.distributed.checkpoint, keyed by parameter names, so that a later run can load them at another
world size; everything else is one readable JSON file, written last. That package takes a second to import: a run does so
when it first saves or resumes.
"""

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from kdtune.checkpoint.atomic import atomic_write_text
from kdtune.checkpoint.sharded import Write
from kdtune.distributed import is_rank_zero, raise_on_all_ranks, to_cpu_copy
from kdtune.errors import CheckpointError
from kdtune.json_files import read_json
from kdtune.log import get_logger
from kdtune.paths import user_path

if TYPE_CHECKING:
    from torch.distributed.checkpoint.stateful import Stateful

STATE_FILE = "state.json"
TENSORS_FILE = ".metadata"
"""Written last by torch.distributed.checkpoint: without it the tensors are incomplete."""
_VERSION = 1
_LOSS, _ROLLOUTS = "loss.", "rollouts."


def state_writer(
    *,
    model: nn.Module,
    optimizer: Optimizer,
    extra: Mapping[str, Any],
    scheduler: "Stateful | None" = None,
    loss: "Stateful | None" = None,
    rollouts: "Stateful | None" = None,
    staged: bool = False,
) -> Write:
    """Return a function that writes the current resume state into an existing folder, such as a part of an atomic folder.

    Tensors are read when the function writes; with `staged`, they are copied to CPU memory now.

    Raises:
        CheckpointError: a value is neither a tensor nor JSON.
    """
    # An optimizer before its first step has no state: get_optimizer_state_dict would create one by taking a step.
    trained = _with_parameters(model, loss)
    tensors, scalars = _split(_named_state(trained, optimizer) if optimizer.state else {})
    loss_tensors, loss_values = _state_of(loss, _LOSS)
    rollout_tensors, rollout_values = _state_of(rollouts, _ROLLOUTS)
    rng_tensors, python_rng = _rng_state()
    document = {
        "version": _VERSION,
        "extra": dict(extra),
        "optimizers": [_describe(trained, optimizer)],
        "optimizer_scalars": scalars,
        "optimizer_tensors": {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()},
        "schedulers": [] if scheduler is None else [scheduler.state_dict()],
        **({"loss": {"values": loss_values, "tensors": sorted(loss_tensors)}} if loss_values or loss_tensors else {}),
        # Buffers have other sizes in every step.
        **(
            {
                "rollouts": {
                    "values": rollout_values,
                    "tensors": {name: _kind(one) for name, one in rollout_tensors.items()},
                }
            }
            if rollouts
            else {}
        ),
        "rng": {"python": python_rng, "tensors": {name: list(tensor.shape) for name, tensor in rng_tensors.items()}},
    }
    try:
        text = json.dumps(document, indent=1, default=_scalar_tensor)
    except TypeError as error:
        raise CheckpointError(
            f"{STATE_FILE}: a value of the optimizer, scheduler, loss, rollouts or extra state is neither a tensor nor JSON: {error}"
        ) from error
    kept = {
        name: to_cpu_copy(tensor) if staged else tensor
        for name, tensor in {**tensors, **loss_tensors, **rollout_tensors, **rng_tensors}.items()
    }

    def write(folder: Path, group: ProcessGroup | None = None) -> None:
        from kdtune.checkpoint import dcp

        dcp.write_tensors(folder, kept, group)
        with raise_on_all_ranks(group):
            if is_rank_zero():
                atomic_write_text(folder / STATE_FILE, text)

    return write


def load_state(
    folder: str | Path,
    *,
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: "Stateful | None" = None,
    loss: "Stateful | None" = None,
    rollouts: "Stateful | None" = None,
    ignore_scheduler: bool = False,
) -> dict[str, Any]:
    """Restore optimizer, scheduler, loss, rollouts and random number generators in place; return the `extra` that was saved.

    Load the weights first. Gradients are cleared. With `ignore_scheduler`, neither the saved scheduler nor this one matters.

    Raises:
        CheckpointError: the folder is missing or incomplete, or was saved with another optimizer, scheduler or loss, or for
            another model; the message names the difference.
    """
    from kdtune.checkpoint import dcp

    path = user_path(folder)
    document = read_state_file(path)
    schedulers = [] if scheduler is None or ignore_scheduler else [scheduler]
    saved_schedulers = [] if ignore_scheduler else document["schedulers"]
    trained = _with_parameters(model, loss)
    _check_same_kind(path, document["optimizers"], trained, optimizer, (len(saved_schedulers), len(schedulers)))
    optimizer.zero_grad(set_to_none=True)
    tensors = _targets(path, document, trained, optimizer)
    loss_tensors = _loss_targets(path, document, loss)
    rollout_tensors = _rollout_targets(path, document, rollouts)
    rng_tensors = {name: torch.empty(shape, dtype=torch.uint8) for name, shape in document["rng"]["tensors"].items()}
    dcp.read_tensors(path, {**tensors, **loss_tensors, **rollout_tensors, **rng_tensors})
    if loss is not None and "loss" in document:
        own = {name.removeprefix(_LOSS): tensor for name, tensor in loss_tensors.items()}
        loss.load_state_dict({**own, **document["loss"]["values"]})
    if rollouts is not None:
        own = {name.removeprefix(_ROLLOUTS): tensor for name, tensor in rollout_tensors.items()}
        rollouts.load_state_dict({**own, **document["rollouts"]["values"]})
    for group, saved in zip(optimizer.param_groups, _with_tensors(document["optimizers"][0]["groups"]), strict=True):
        group.update({key: _like(group.get(key), value) for key, value in saved.items() if key != "params"})
    for one, saved in zip(schedulers, saved_schedulers, strict=True):
        one.load_state_dict(_with_tensors(saved))
        _set_learning_rates(one)
    _restore_rng(rng_tensors, document["rng"]["python"])
    return document["extra"]


def read_state_file(folder: Path) -> dict[str, Any]:
    """Return the JSON part of a resume state; CheckpointError if it is missing, damaged, or of another version."""
    document = read_json(folder / STATE_FILE)
    if document.get("version") != _VERSION:
        raise CheckpointError(
            f"{folder / STATE_FILE}: version {document.get('version')!r} found, {_VERSION} expected; "
            "resume with the version of kdtune that wrote it"
        )
    return document


def is_whole_state(folder: Path) -> bool:
    """Return whether the folder holds both parts of a resume state."""
    return (folder / STATE_FILE).is_file() and (folder / TENSORS_FILE).is_file()


def _with_parameters(model: nn.Module, loss: "Stateful | None") -> nn.Module:
    """Return a module that has the parameters of a model under their names, and those of a loss, if it has any, beside them."""
    beside = getattr(loss, "module", None)
    if beside is None:
        return model
    both = nn.Module()
    for name, child in [*model.named_children(), ("loss", beside)]:
        both.add_module(name, child)
    return both


def _state_of(one: "Stateful | None", prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of the state of a loss or of rollouts, each by its name after the prefix, and its other values."""
    found = {} if one is None else one.state_dict()
    tensors = {f"{prefix}{name}": value for name, value in found.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in found.items() if not isinstance(value, Tensor)}


def _kind(tensor: Tensor) -> list[Any]:
    """Return dtype and shape of a tensor, as JSON has them."""
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]


def _rollout_targets(folder: Path, document: dict[str, Any], rollouts: "Stateful | None") -> dict[str, Tensor]:
    """Return tensors that the saved ones of the rollouts go into."""
    if ("rollouts" in document) != (rollouts is not None):
        raise CheckpointError(
            f"{folder / STATE_FILE}: only {'the saved' if rollouts is None else 'this'} run has rollouts; resume with the config of the "
            "run that wrote it"
        )
    saved = document["rollouts"]["tensors"] if rollouts is not None else {}
    return {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in saved.items()}


def _loss_targets(folder: Path, document: dict[str, Any], loss: "Stateful | None") -> dict[str, Tensor]:
    """Return the loss's tensors that the saved ones go into; its state must have the names that the saved one has."""
    tensors, values = _state_of(loss, _LOSS)
    saved = document.get("loss", {"tensors": [], "values": {}})
    if different := sorted({*tensors, *values} ^ {*saved["tensors"], *saved["values"]}):
        raise CheckpointError(
            f"{folder / STATE_FILE}: {different[0]!r} is only in the saved or only in this run's state of the loss; resume with "
            "the config of the run that wrote it"
        )
    return tensors


def _parameter_names(model: nn.Module) -> dict[nn.Parameter, str]:
    """Names as get_optimizer_state_dict spells them: without the layers that wrappers put in."""
    wrappers = ("_orig_mod.", "_checkpoint_wrapped_module.")
    names = {}
    for name, parameter in model.named_parameters():
        for wrapper in wrappers:
            name = name.replace(wrapper, "")
        names[parameter] = name
    return names


def _named_state(model: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """Return the state by parameter name and key. The tensors are the optimizer's own, so loading can fill them in place."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    # strict=False: a parameter without state (plain SGD) is no error here; what must be there is checked by name below.
    options = StateDictOptions(strict=False)
    found: Any = get_optimizer_state_dict(model, optimizer, options=options)["state"]
    return found


def _split(named: Mapping[str, dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and other values of a state, each by `parameter name.key`."""
    flat = {f"{parameter}.{key}": value for parameter, entries in named.items() for key, value in entries.items()}
    tensors = {f"optimizer.{name}": value for name, value in flat.items() if isinstance(value, Tensor)}
    return tensors, {name: value for name, value in flat.items() if not isinstance(value, Tensor)}


def _describe(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Describe the optimizer: its class and parameter groups, with names in place of parameters."""
    names = _parameter_names(model)
    groups = [{**group, "params": [names[one] for one in group["params"]]} for group in optimizer.param_groups]
    return {"class": type(optimizer).__name__, "groups": groups}


def _check_same_kind(
    folder: Path, saved: list[dict[str, Any]], model: nn.Module, optimizer: Optimizer, num_schedulers: tuple[int, int]
) -> None:
    place = folder / STATE_FILE
    advice = "resume with the config of the run that wrote it"
    for what, (count, expected) in (("optimizers", (len(saved), 1)), ("schedulers", num_schedulers)):
        if count != expected:
            raise CheckpointError(f"{place}: holds {count} {what}, this run has {expected}; {advice}")
    theirs, ours = saved[0], _describe(model, optimizer)
    if theirs["class"] != ours["class"]:
        raise CheckpointError(f"{place}: saved by optimizer {theirs['class']}, this run has {ours['class']}; {advice}")
    their_names = [group["params"] for group in theirs["groups"]]
    our_names = [group["params"] for group in ours["groups"]]
    if their_names != our_names:
        different = set().union(*their_names) ^ set().union(*our_names)
        first = f" (first: {min(different)!r})" if different else " in how they are grouped"
        raise CheckpointError(f"{place}: {theirs['class']} trained other parameters than this run's{first}; {advice}")


def _targets(folder: Path, document: dict[str, Any], model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Fill in the saved scalars and return the optimizer's tensors that the saved ones go into; both sides must agree."""
    saved_tensors, saved_scalars = document["optimizer_tensors"], document["optimizer_scalars"]
    has_state = {name.removeprefix("optimizer.").rpartition(".")[0] for name in (*saved_tensors, *saved_scalars)}
    if not has_state:
        optimizer.state.clear()
        return {}
    names = _parameter_names(model)
    # Creates missing tensors by a step with learning rate 0 and no gradient.
    _named_state(model, optimizer)
    for parameter, name in names.items():
        if name not in has_state:
            optimizer.state.pop(parameter, None)
    tensors, scalars = _split(_named_state(model, optimizer))
    here = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    for name in sorted({*here, *saved_tensors}):
        if here.get(name) != saved_tensors.get(name):
            raise CheckpointError(
                f"{folder}: tensor {name!r}: {saved_tensors.get(name, 'nothing')} saved, {here.get(name, 'nothing')} "
                "expected; resume with the optimizer settings and dtype of the run that wrote it"
            )
    if different := sorted(scalars.keys() ^ saved_scalars.keys()):
        raise CheckpointError(f"{folder}: {different[0]!r}: only in the saved or only in this run's optimizer state")
    parameters = {name: parameter for parameter, name in names.items()}
    for name, value in saved_scalars.items():
        owner, _, key = name.rpartition(".")
        state = optimizer.state[parameters[owner]]
        state[key] = _like(state[key], value)
    return tensors


def _set_learning_rates(scheduler: "Stateful") -> None:
    """Set this run's scheduled rates at the saved step: the saved rates follow the old schedule, which may have been shorter."""
    if isinstance(scheduler, LambdaLR):
        rates = [
            base * at(scheduler.last_epoch) for base, at in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = _like(group["lr"], rate)


def _like(current: Any, value: Any) -> Any:
    """Convert a JSON value to the kind of container that the optimizer holds it in."""
    if isinstance(current, Tensor):
        return current.fill_(value)
    return tuple(value) if isinstance(current, tuple) else value


def _scalar_tensor(value: Any) -> dict[str, Any]:
    """Return JSON for a one-element tensor, such as a learning rate that a compiled optimizer reads."""
    if isinstance(value, Tensor) and value.ndim == 0:
        return {"scalar tensor": value.item(), "dtype": str(value.dtype).removeprefix("torch.")}
    raise TypeError(f"{type(value).__name__} found")


def _with_tensors(value: Any) -> Any:
    """Turn such JSON back into tensors, anywhere in a JSON value."""
    if isinstance(value, dict):
        if value.keys() == {"scalar tensor", "dtype"}:
            return torch.tensor(value["scalar tensor"], dtype=getattr(torch, value["dtype"]))
        return {key: _with_tensors(item) for key, item in value.items()}
    return [_with_tensors(item) for item in value] if isinstance(value, list) else value


def _rng_state() -> tuple[dict[str, Tensor], list[Any]]:
    """Return the states of torch's generators by device, and of Python's."""
    tensors = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"rng.cuda.{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    if torch.backends.mps.is_available():
        tensors["rng.mps"] = torch.mps.get_rng_state()
    version, numbers, gauss = random.getstate()
    return tensors, [version, list(numbers), gauss]


def _restore_rng(tensors: Mapping[str, Tensor], python: list[Any]) -> None:
    here = set(_rng_state()[0])
    if different := sorted(here ^ tensors.keys()):
        get_logger(__name__).warning(
            "resuming on other devices than the run was saved on (%s differ): random numbers there start anew",
            ", ".join(different),
        )
    for name in here & tensors.keys():
        kind, _, index = name.removeprefix("rng.").partition(".")
        if kind == "cuda":
            torch.cuda.set_rng_state(tensors[name], int(index))
        elif kind == "mps":
            torch.mps.set_rng_state(tensors[name])
        else:
            torch.set_rng_state(tensors[name])
    version, numbers, gauss = python
    random.setstate((version, tuple(numbers), gauss))
