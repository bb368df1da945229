"""The text of each training step: the data's, or one that a model writes after the data's prompts, now or some steps ago.

Shapes: N targets of a micro-batch, B batch, S sequence, A tokens of an answer, D width of the teacher's hidden states.
"""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdtune.data import Batch, collate
from kdtune.data.micro_batches import is_padding_free
from kdtune.distributed import World, lockstep_forwards
from kdtune.errors import ConfigError, DataError
from kdtune.generation import (
    Completion,
    Sampling,
    Speculation,
    check_max_new_tokens,
    check_speculative,
    complete,
    complete_speculatively,
)
from kdtune.losses import HiddenSignal, PendingSignal, signal_token_log_probs
from kdtune.losses.heads import project
from kdtune.models import Transformer
from kdtune.models.flops import ModelFlops
from kdtune.rollouts.buffer import Buffer
from kdtune.rollouts.checks import OF_BOTH, check_compiled, check_writer_ids, config_problems
from kdtune.rollouts.micro_batches import log_ratios, parts_of, weighted, with_class_weights
from kdtune.rollouts.policy import Policy, Source
from kdtune.rollouts.policy_gradient import FloatArray, PolicyGradient, importance_weights
from kdtune.rollouts.record import Prompt, Rollout, prompts_of, random_seed
from kdtune.rollouts.watch import Guards, describe, watched, watched_means, watched_targets
from kdtune.tensor_types import is_fsdp_module


class Rollouts:
    """Text that the student or the teacher writes, in place of the data's answers: the key `rollouts` of distillation.

    The policy decides whose text a step learns from. The prompts are those of the step's examples; a text depends on the seed, the
    epoch, its prompt and the weights, not on batches or processes. Token ids are trained on as they were generated. On the student's
    own text there is no cross entropy (imitating itself teaches nothing): the divergence alone, with its weight kd_ratio.

    Args:
        policy: such as `kdtune.rollouts.Share`.
        max_new_tokens: longest answer; one that is cut has no end to learn.
        temperature: of the sampling, not of the divergence; 0 takes the most likely token.
        top_k: sample from so many most likely tokens; None: from all.
        top_p: sample from the fewest most likely tokens that hold this probability; None: from all.
        teacher_share: of the teacher's distribution in the mixture that `mixed` text is drawn from; MiniLLM's alpha.
        speculation: how the teacher corrects `speculative` text, `kdtune.generation.Speculation`; None: as published.
        slots: texts that are written at a time, by each process.
        compile: compile the forward of a text's next tokens, but of `speculative` text; worth it for many steps, see docs/benchmarks.md.
        writer: what writes the student's text in place of kdtune's own decoder, `kdtune.rollouts.VLLMWriter`; None: the decoder.
        buffer_size: earlier texts that are kept for a policy with replay, in all processes together.
        max_staleness: optimizer steps after which a kept text is dropped; None: never.
        keep_targets: keep the teacher's last hidden states of the texts in the buffer too, in the CPU's memory, so that learning from one
            again costs no forward of the teacher. Without effect for a teacher that is not a model in the same processes.
        policy_gradient: MiniLLM's term on the student's own text, `kdtune.rollouts.PolicyGradient`; None: none.
        guards: when to stop, see `kdtune.rollouts.Guards`; None: its defaults.

    Raises:
        ConfigError: a number is out of range.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        teacher_share: float = 0.2,
        speculation: Speculation | None = None,
        slots: int = 32,
        compile: bool = False,
        writer: Any = None,
        buffer_size: int = 0,
        max_staleness: int | None = None,
        keep_targets: bool = True,
        policy_gradient: PolicyGradient | None = None,
        guards: Guards | None = None,
    ) -> None:
        check_max_new_tokens(max_new_tokens)
        if not isinstance(policy, Policy):
            raise ConfigError(
                f"policy={policy}: must be an object with the methods of kdtune.rollouts.Policy; give policy._component_, such as "
                "kdtune.rollouts.Share"
            )
        if slots < 1:
            raise ConfigError(f"slots={slots}: must be 1 or more")
        if writer is not None and not hasattr(writer, "complete"):
            raise ConfigError(
                f"writer={writer}: must be an object such as kdtune.rollouts.VLLMWriter; give writer._component_"
            )
        self.policy, self.max_new_tokens, self.slots, self.writer = policy, max_new_tokens, slots, writer
        if not 0 < teacher_share < 1:
            raise ConfigError(f"teacher_share={teacher_share}: must lie between 0 and 1")
        self.sampling, self.teacher_share = Sampling(temperature, top_k, top_p), teacher_share
        self.speculation = Speculation() if speculation is None else speculation
        self.buffer, self.keep_targets, self.compile = Buffer(buffer_size, max_staleness), keep_targets, compile
        self.policy_gradient, self.guards = policy_gradient, Guards() if guards is None else guards
        self.metrics: dict[str, float] = {}
        self._num_shown = 0

    def problems(self, cfg: Any) -> list[str]:
        """Return why a distillation config cannot have these texts, one sentence each; read no weights and no rows."""
        return config_problems(self, cfg)

    def writers(self, sources: Collection[str] | None = None) -> frozenset[str]:
        """Return which models, "student" and "teacher", write text of some sources with kdtune's decoder; None: of all of the policy's."""
        given = self.policy.sources if sources is None else sources
        found = {"student", "teacher"} if {*OF_BOTH} & {*given} else {"teacher"} & {*given}
        return frozenset(found | ({"student"} if "student" in given and self.writer is None else set()))

    def start(self, inputs: Any, student: Transformer, teacher: Any, world: World, *, context: int) -> None:
        """Keep the models, the world's processes and the settings of the run.

        `inputs` are `kdtune.training.Inputs`; `context` is the shortest of the models', in tokens. ConfigError if a model cannot write.
        """
        cfg, tokenizer = inputs.cfg, inputs.tokenizer
        self._world, self._student, self._teacher = world, student, teacher
        model = getattr(teacher, "model", None)
        self._teacher_model: Transformer | None = model if isinstance(model, Transformer) else None
        # One that is a component of the config may compute with the student's weights.
        has_own_weights = self._teacher_model is not None and cfg.teacher is None
        self._keeps_targets = self.keep_targets and self.buffer.capacity > 0 and has_own_weights
        if self._keeps_targets and is_fsdp_module(model):
            model.unshard()  # a resumed run may read the head before the teacher's first forward
        if "speculative" in self.policy.sources:
            check_speculative(student, model)
        check_compiled(self, {"student": student, "teacher": model})
        self._seed, self._num_steps, self._kd_ratio = cfg.seed, inputs.num_steps, cfg.kd_ratio
        self._batch_size, self._max_tokens = cfg.batch_size, cfg.tokens_per_micro_batch
        self._padding_free, self._pad_id, self._stop_ids = is_padding_free(cfg), tokenizer.pad_id, tokenizer.stop_ids
        self._longest = min(context, tokenizer.max_seq_len or context)
        self._num_ids = min(student.config.vocab_size, teacher.vocab_size)
        check_writer_ids(self, student.config.vocab_size, teacher.vocab_size)
        if self.writer is not None:
            base = (cfg.checkpointer or {}).get("checkpoint_dir")
            self.writer.start(student, world, longest=self._longest, base=base)

    def batches(self, step: Any) -> list[Batch]:
        """Return the micro-batches that this process learns from in a step: the step's own, or texts that take their place.

        All processes call it. `step` has the step's `number`, `batches` and `position`, and is told of each text by what its `writing`
        returns (`kdtune.training.Step`).

        Raises:
            TrainingError: a guard stops the run.
            DataError: the data set makes batches that do not say where its prompts end.
        """
        since = time.perf_counter()
        self.buffer.drop_stale(step.number)
        sources, self._has_no_class_loss, self._flops = self._sources(step.number), False, 0
        self.metrics = {f"policy_{name}": value for name, value in self.policy.state_dict().items()}
        self.metrics["rollout_share"] = 1 - sources.count("dataset") / len(sources)
        self._is_teachers_text = False
        weights_at = getattr(self.policy, "weights", None)
        self._weights = {} if weights_at is None else weights_at(step.number / self._num_steps)
        of_data = [weighted(one, self._weights.get("dataset")) for one in step.batches if "dataset" in sources]
        if set(sources) == {"dataset"}:
            return of_data
        if "replay" in sources:
            (count,) = self._world.sum(
                [sum(bool(batch.prompt_lengths) and len(batch.lengths) for batch in step.batches)]
            )
            rollouts = self.buffer.draw(int(count), random_seed(self._seed, step.number, 1))
        else:
            writers = [one for one in sources if one != "dataset"]
            rollouts = [one for number, writer in enumerate(writers) for one in self._written(step, writer, number)]
        if not rollouts:
            raise DataError(
                "rollouts: the data set's batches do not say where its prompts end (Batch.prompt_lengths); ~rollouts"
            )
        shown = watched(rollouts)
        self._num_shown = sum(one.answer_length for one in shown)
        self._is_teachers_text = all(one.source == "teacher" for one in shown)
        self.metrics |= describe(shown, step.number)
        parts = parts_of(rollouts, self._world, self._batch_size, self._max_tokens, is_padded=not self._padding_free)
        # All processes have the teacher's targets of all texts, or none asks it less often than another.
        like = rollouts[0].target if all(one.target is not None for one in rollouts) else None
        batches = [self._batch([rollouts[index] for index in part], like) for part in parts]
        if "replay" not in sources:
            is_drawn = "student" in sources and self.sampling.temperature > 0
            self.guards.check(self.metrics, is_drawn=is_drawn)
            self.metrics["generated_tokens"] = float(sum(one.answer_length for one in rollouts))
            if not {*sources} & {*OF_BOTH} and (self._keeps_targets or self.policy_gradient is not None):
                batches, rollouts = self._answered(batches, parts, rollouts)
            kept = rollouts if self._keeps_targets else [replace(one, target=None) for one in rollouts]
            self.buffer.push(kept)
        batches = [
            replace(batch, targets=replace(batch.targets, watched_M=watched_M))
            for batch, watched_M in zip(batches, watched_targets(rollouts, parts), strict=True)
        ]
        has_data = "dataset" in sources
        self._has_no_class_loss = (
            0 < self._kd_ratio < 1 and not has_data and all(one.source != "teacher" for one in rollouts)
        )
        if 0 < self._kd_ratio < 1:
            weights = self._class_weights(batches, parts, rollouts, step.number)
            batches = with_class_weights(
                batches, parts, weights, torch.promote_types(self._student.dtype, torch.float32)
            )
        (self.metrics["rollout_flops"],) = self._world.sum([self._flops])
        self.metrics["generation_seconds"] = time.perf_counter() - since
        return [*of_data, *batches]

    def described(self, row: Mapping[str, float]) -> dict[str, float]:
        """Return the row of a step's metrics with those of its text.

        Where cross entropy is no part of the loss, on the student's own text, the row has no `class_loss`; what stands there with a policy
        gradient is `policy_gradient_loss`.
        """
        found = {**watched_means(row, self._num_shown), **self.metrics}
        if self._is_teachers_text:  # over which it would estimate the forward KL, below 0
            found.pop("rollout_log_ratio", None)
        if self._has_no_class_loss and "class_loss" in found:
            value = found.pop("class_loss")
            found |= {} if self.policy_gradient is None else {"policy_gradient_loss": value}
        return found

    def after_validation(self, metrics: Mapping[str, float]) -> None:
        """Tell the policy the results of a validation; TrainingError if they show a teacher that cannot teach."""
        self.policy.after_validation(metrics)
        self.guards.check_teacher(metrics, self._teacher.vocab_size)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run must have again, by part and name: tensors, and values that JSON has."""
        return {
            f"{part}.{name}": value
            for part, one in self._parts_with_state()
            for name, value in one.state_dict().items()
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore it."""
        for part, one in self._parts_with_state():
            own = {
                name.removeprefix(f"{part}."): value
                for name, value in state_dict.items()
                if name.startswith(f"{part}.")
            }
            one.load_state_dict(own)

    def _parts_with_state(self) -> list[tuple[str, Any]]:
        return [("policy", self.policy), ("buffer", self.buffer), ("guards", self.guards)]

    def _sources(self, step: int) -> tuple[Source, ...]:
        draw = np.random.default_rng(random_seed(self._seed, step)).random()
        found = self.policy.source(draw, step / self._num_steps, is_full=self.buffer.is_full)
        if found == "replay" and not self.buffer.rollouts:
            # There is none yet, or all have become too old.
            writers: tuple[Source, ...] = ("student", "mixed", "speculative", "teacher")
            found = next((one for one in writers if one in self.policy.sources), "student")
        return (found,) if isinstance(found, str) else found

    def _written(self, step: Any, source: Source, number: int) -> list[Rollout]:
        """Return the texts after the prompts of all processes' examples, ordered by example: the same on all of them.

        `number` of the step's writers: the draws of the second are not those of the first.
        """
        prompts = [prompt for batch in step.batches for prompt in prompts_of(batch)]
        more = (number,) if number else ()
        asked: dict[str, Any] = {
            "prompts": [prompt.ids for prompt in prompts],
            "max_new_tokens": self.max_new_tokens,
            "stop_ids": self._stop_ids,
            "sampling": self.sampling,
            "seeds": [random_seed(self._seed, step.position[0], prompt.key, *more) for prompt in prompts],
        }
        ours: dict[str, Any] = {"slots": self.slots, "num_ids": self._num_ids, "progress": step.writing(len(prompts))}
        options: dict[str, Any] = {"with_log_probs": True, "compile": self.compile}
        student, teacher = self._student, self._teacher_model
        if source == "student" and self.writer is not None:
            found = self.writer.complete(**asked)
        elif source == "student":
            with lockstep_forwards(student, self._world):
                found = complete(student, **options, **asked, **ours)
        elif teacher is None:
            raise ConfigError(
                "rollouts.policy: the teacher is to write, and it is no model in this process; give a policy without its texts"
            )
        elif source == "teacher":
            with lockstep_forwards(teacher, self._world):
                found = complete(teacher, **options, **asked, **ours)
        elif source == "mixed":
            mixture: dict[str, Any] = {"partner": teacher, "partner_share": self.teacher_share}
            found = complete(student, **mixture, **options, **asked, **ours)
        else:
            found = complete_speculatively(student, teacher, speculation=self.speculation, **asked, **ours)
        alone: dict[Source, list[Transformer | None]] = {"student": [student], "teacher": [teacher]}
        models = alone.get(source, [student, teacher])
        self._count([len(prompt.ids) + one.num_computed - 1 for prompt, one in zip(prompts, found, strict=True)],
                    sum(one.num_computed for one in found), models)  # fmt: skip
        own = [self._rollout(*one, source, step.number) for one in zip(prompts, found, strict=True)]
        return sorted(chain.from_iterable(self._world.gather(own)), key=lambda one: (one.key, one.tokens.tolist()))

    def _count(self, lengths: Sequence[int], num_logits: int, models: Sequence[Transformer | None]) -> None:
        """Add the operations of each model's forward of texts of these lengths, and of so many tokens' logits."""
        self._flops += sum(ModelFlops.of(model).forward(lengths, num_logits) for model in models if model is not None)

    def _rollout(self, prompt: Prompt, completion: Completion, source: Source, step: int) -> Rollout:
        """Return a text, cut to the shortest context that has to read it."""
        room = self._longest - len(prompt.ids)
        ids, log_probs, of_teacher = completion.ids[:room], completion.log_probs, completion.partner_log_probs
        hidden = completion.partner_hidden
        return Rollout(
            np.array([*prompt.ids, *ids]),
            len(prompt.ids),
            completion.is_finished and len(completion.ids) <= room,
            source,
            step,
            prompt.key,
            prompt.route,
            None if log_probs is None else np.array(log_probs[:room]),
            None if of_teacher is None else np.array(of_teacher[:room]),
            None if hidden is None else hidden[:room],
        )

    def _batch(self, rollouts: Sequence[Rollout], like: Tensor | None) -> Batch:
        """Return a micro-batch of some rollouts, maybe none, with the teacher's signal if the step's targets, `like` one, are kept."""
        batch = collate([one.example() for one in rollouts], self._pad_id, padding_free=self._padding_free)
        if rollouts:
            writer = rollouts[0].source
            batch = replace(batch, targets=replace(batch.targets, is_own_text=writer != "teacher"))
            batch = weighted(batch, self._weights.get(writer))
        if like is None:
            return batch
        # The loss reads the positions that have a target, and no others.
        targets = [one.target for one in rollouts if one.target is not None]
        target_ND, positions_N = torch.cat([like[:0], *targets]), batch.targets.positions_N
        hidden_TD = target_ND.new_zeros(batch.tokens.numel(), target_ND.shape[1]).index_copy_(0, positions_N, target_ND)
        hidden_BSD = hidden_TD.view(*batch.tokens.shape, -1).to(self._world.device)
        return replace(batch, signal=HiddenSignal(hidden_BSD, self._teacher.head()))

    def _answered(
        self, batches: Sequence[Batch], parts: Sequence[Sequence[int]], rollouts: Sequence[Rollout]
    ) -> tuple[list[Batch], list[Rollout]]:
        """Ask the teacher now: return the batches with its signal, and all processes' rollouts with what is needed of it."""
        answered: list[Batch] = []
        own: dict[int, dict[str, Any]] = {}
        for batch, part in zip(batches, parts, strict=True):
            targets = batch.targets.map(lambda tensor: tensor.to(self._world.device))
            signal = self._teacher(batch.to(self._world.device))
            num_logits = 0 if self.policy_gradient is None else len(targets)
            self._count(batch.lengths, num_logits, [self._teacher_model])
            signal = signal.result() if isinstance(signal, PendingSignal) else signal
            answered.append(replace(batch, signal=signal))
            of_tokens: dict[str, Tensor] = {}
            if self._keeps_targets and isinstance(signal, HiddenSignal):
                of_tokens["target"] = signal.hidden_BSD.flatten(0, 1)[targets.positions_N].cpu()
            if self.policy_gradient is not None:
                is_hidden = isinstance(signal, HiddenSignal)
                source = project("teacher", signal.hidden_BSD, signal.output) if is_hidden else signal
                logp_N = signal_token_log_probs(source, targets.positions_N, targets.labels_N)
                of_tokens["teacher_log_probs"] = logp_N.cpu().double()
            sizes = [rollouts[index].answer_length for index in part]
            for name, values in of_tokens.items():
                for index, value in zip(part, values.split(sizes), strict=True):
                    own.setdefault(index, {})[name] = value.numpy() if name == "teacher_log_probs" else value.clone()
        everyone: dict[int, dict[str, Any]] = {}
        for found in self._world.gather(own):
            everyone |= found
        return answered, [replace(one, **everyone[index]) for index, one in enumerate(rollouts)]

    def _class_weights(
        self, batches: Sequence[Batch], parts: Sequence[Sequence[int]], rollouts: Sequence[Rollout], step: int
    ) -> list[FloatArray]:
        """Return the weights [A] of cross entropy of each rollout: 1 on the teacher's text; on the student's 0, or its advantages."""
        if self.policy_gradient is None:
            return [np.full(one.answer_length, float(one.source == "teacher")) for one in rollouts]
        advantages = self.policy_gradient.advantages(rollouts)
        if any(one.step < step for one in rollouts):
            for batch in batches:
                self._count(batch.lengths, len(batch.targets), [self._student])
            for index, changes in log_ratios(self._student, batches, parts, rollouts, self._world.device).items():
                advantages[index] = self.policy_gradient.replayed(advantages[index], changes)
        # Cross entropy has the weight 1 - kd_ratio; this term has that of the divergence.
        scale = self._kd_ratio / (1 - self._kd_ratio)
        return [
            scale * advantage * importance_weights(one, self.teacher_share if one.source == "mixed" else 0.0)
            for advantage, one in zip(advantages, rollouts, strict=True)
        ]
