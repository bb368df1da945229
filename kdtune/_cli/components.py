"""Components for `kdtune ls`: which ones exist of a kind, and the arguments of one. Only this module imports their packages."""

import inspect
import re
import textwrap
from typing import Any

from kdtune.config.check import accepts, resolve
from kdtune.config.check import describe as type_text
from kdtune.config.component import parameters_of, returned_class
from kdtune.errors import ConfigError
from kdtune.log import terminal_width, wrap

_WIDTH = 110
_TORCH_OPTIMIZERS = ("AdamW", "Adam", "SGD", "Adafactor", "RMSprop", "NAdam", "RAdam", "Adagrad", "Adadelta", "Muon")
# Kind -> package and the class that its components build; or the components themselves.
_FOUND = {
    "datasets": ("kdtune.data", "kdtune.data.Dataset"),
    "models": ("kdtune.models", "kdtune.models.Transformer"),
    "schedules": ("kdtune.training", "torch.optim.lr_scheduler.LRScheduler"),
    "tokenizers": ("kdtune.tokenizers", "kdtune.tokenizers.Tokenizer"),
}
_LOSSES = [
    "ForwardKL", "ReverseKL", "SymmetricKL", "JensenShannon", "TotalVariation", "SkewForwardKL", "SkewReverseKL", "AdaptiveKL",
    "AlphaBeta", "ConcreteScore", "ArgMaxCrossEntropy", "Mixture", "TAID", "WeightedSum", "BySource", "SampledReverseKL",
    "ULD", "HybridULD", "ALM", "HiddenStateLoss", "TopKTargets", "SampledTargets",
]  # fmt: skip
_LISTED = {
    "adapters": ["kdtune.models.apply_lora"],
    "checkpointers": ["kdtune.checkpoint.Checkpointer"],
    "loggers": ["kdtune.training.TensorBoardLogger", "kdtune.training.WandBLogger"],
    "losses": [f"kdtune.losses.{name}" for name in _LOSSES],
    "optimizers": ["kdtune.training.adamw", "kdtune.training.Muon"],
    "parallelism": ["kdtune.distributed.Parallelism"],
    "profilers": ["kdtune.training.Profiler"],
    "rollouts": [
        *(
            f"kdtune.rollouts.{name}"
            for name in ("Rollouts", "Share", "DistiLLMSchedule", "Pairs", "PolicyGradient", "Guards")
        ),
        "kdtune.generation.Speculation",
    ],
    "teachers": [
        f"kdtune.teachers.{name}" for name in ("CachedTeacher", "LiveTeacher", "BaseOfStudent", "Mixture", "Routed")
    ],
}
_MORE = {
    "losses": "Any object that is called as `divergence(student_logp_NV, teacher_logp_NV) -> [N]` serves too (docs/losses.md); "
    "kdtune.losses.presets has them by paper; ULD, HybridULD and ALM\n"
    "are for a teacher with another tokenizer, HiddenStateLoss for `hidden_loss`, and the last two for `teacher_targets`.",
    "optimizers": "Any other optimizer whose step needs no closure serves too, such as torchao.optim.AdamW8bit.",
    "schedules": "Any class of torch.optim.lr_scheduler that goes by the number of steps serves too.",
    "rollouts": "Rollouts is for the key `rollouts`, the others for its arguments `policy` (Share, DistiLLMSchedule, Pairs),\n"
    "`policy_gradient`, `speculation` and `guards`.",
    "teachers": "For the key `teacher`, in place of teacher_checkpointer and teacher_model.",
}
_GIVEN = ("tokenizer", "params", "optimizer", "num_training_steps", "model", "log_dir")
KINDS = tuple(sorted([*_FOUND, *_LISTED]))


def kind_text(kind: str) -> str:
    """List the components of a kind, one a line: what to write in a config, and the first line of its docs."""
    names = _LISTED.get(kind) or found(*_FOUND[kind])
    if kind == "optimizers":
        names = [
            *names,
            *(f"torch.optim.{name}" for name in _TORCH_OPTIMIZERS if hasattr(resolve("torch.optim"), name)),
        ]
    width, columns = max(map(len, names)), terminal_width()
    lines = [f"{name:<{width}}  {_first_line(resolve(name))}".rstrip() for name in names]
    if columns is not None and max(map(len, lines)) > columns:
        lines = [wrap(f"{name}\n    {_first_line(resolve(name))}".rstrip(), columns) for name in names]
    more = [_MORE[kind]] if kind in _MORE else []
    return "\n".join(
        [*lines, "", *(wrap(line, columns) for line in [*more, "`kdtune ls NAME` shows what one of them takes."])]
    )


def found(package: str, made: str) -> list[str]:
    """Return the package's public functions that build such an object, by dotted path; they need nothing but config arguments."""
    module, kind = resolve(package), resolve(made)
    names = []
    for name in dir(module):
        target = getattr(module, name)
        given = returned_class(target) if inspect.isfunction(target) else None
        takes_objects = given and {"config", "model", "dataset"} & (parameters_of(target) or {}).keys()
        if inspect.isclass(given) and issubclass(given, kind) and not takes_objects:
            names.append(f"{package}.{name}")
    return names


def component_text(dotted: str) -> str:
    """Describe a component: one line for each argument with type and default, then its docs.

    Raises:
        ConfigError: there is no such component.
    """
    target = resolve(dotted)
    if not callable(target):
        raise ConfigError(f"{dotted} is not a class or function that a config can name")
    width = terminal_width()
    lines = [wrap(f"{dotted}: {_first_line(target)}", width, hang=2), "", "arguments (* must be set):"]
    parameters = parameters_of(target)
    for name, parameter in (parameters or {}).items():
        if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            continue
        is_given = name in _GIVEN and parameter.default is inspect.Parameter.empty
        default = "" if parameter.default is inspect.Parameter.empty else _default_text(parameter)
        mark = " " if default or is_given else "*"
        kind = "" if parameter.annotation is Any else f": {type_text(parameter.annotation)}"
        given = "  (the recipe gives it)" if is_given else ""
        lines.append(f"{mark} " + wrap(f"{name}{kind}{default}{given}", width and width - 2, hang=6))
    if not parameters:
        lines.append("  none" if parameters is not None else "  not known: it is not written in Python")
    docs = (_docs(target)).partition("\n")[2].strip("\n")
    return "\n".join([*lines, "", _reflowed(textwrap.dedent(docs), width)]).rstrip()


def _reflowed(docs: str, width: int | None) -> str:
    """Rewrap paragraphs whose lines are too long; lists, arguments and code keep their own lines."""
    if width is None:
        return docs
    lines: list[str] = []
    is_long = False
    for line in docs.split("\n"):
        starts = not line.strip() or re.match(r"\s*(\w+: |\w+:$|[-*] |>>> |`)", line)
        if is_long and not starts:
            lines[-1] += " " + line.strip()
        else:
            lines.append(line)
        is_long = len(line) > width or (is_long and not starts)
    return wrap("\n".join(lines), width)


def _docs(target: Any) -> str:
    """Return a class's docs, followed by those of its __init__ if it has any."""
    text = inspect.getdoc(target) or ""
    if inspect.isclass(target) and vars(target).get("__init__") is not None:
        own = target.__init__.__doc__
        text += f"\n\n{inspect.cleandoc(own)}" if own and own != object.__init__.__doc__ else ""
    return text.strip()


def _first_line(target: Any) -> str:
    line = (inspect.getdoc(target) or "").partition("\n")[0].strip()
    return textwrap.shorten(line, _WIDTH, placeholder=" ...")


def _default_text(parameter: inspect.Parameter) -> str:
    value = parameter.default
    if value is None and not accepts(parameter.annotation, None):
        return "  (may be left out)"  # an option of a group, whose default only the function knows
    return f" = {'null' if value is None else str(value).lower() if isinstance(value, bool) else repr(value)}"
