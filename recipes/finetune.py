"""Finetune a model on a dataset: all its parameters, or adapters beside frozen ones. The case study's teacher, and its SFT baseline.

    kdtune run lora_finetune_single_device --config llama3_1/8B_lora_single_device
    kdtune run full_finetune_single_device --config llama3_2/1B_full_single_device optimizer.lr=1e-5

The loss of a token is its cross entropy, in nats. A step's gradient is the sum over its valid tokens divided by their
number, counted before the first backward: it does not depend on how the step is cut into micro-batches. The full
[tokens, vocabulary] logits are never in memory (kdtune/losses).
"""

from dataclasses import dataclass

from torch import Tensor

from kdtune import config, data, evaluation, losses, models, runs, tokenizers, training
from kdtune.distributed import World

ALIASES = (
    "lora_finetune_single_device",
    "full_finetune_single_device",
    "lora_finetune_distributed",
    "full_finetune_distributed",
)


@dataclass(kw_only=True)
class Config(training.TrainingConfig):
    """The keys of every training recipe (kdtune/training/config.py)."""


@config.entry_point(Config)
def main(cfg: Config) -> None:
    """Run the recipe."""
    with training.start(cfg) as (world, progress):
        run(cfg, world, progress)


def run(cfg: Config, world: World, progress: runs.Progress) -> None:
    """Train the model of the config: data, model, optimizer, loop, final/."""
    # Data. It comes first: no weight is read for examples that cannot be trained on.
    inputs = training.load_inputs(cfg, world, progress)
    if inputs.is_finished:
        return training.show_results(cfg, world, trained="model")

    # Model, loss and optimizer.
    progress.phase("loading the model")
    model = training.build_trained_model(cfg, world, inputs, "model")
    tokenizers.check_vocabulary(inputs.tokenizer, model.config.vocab_size)
    loss_fn = losses.KDLoss(kd_ratio=0.0, **cfg.loss_settings())
    optimizer, scheduler = training.build_optimizer(cfg, model, inputs.num_steps)

    with training.Run(inputs, world, progress, model=model, optimizer=optimizer, scheduler=scheduler) as session:
        if session.is_new:
            session.log(validate(model, loss_fn, inputs.held_out, world, progress))
            session.sample({"model": model})

        for step in session.steps():
            for batch in step.micro_batches():
                loss, parts = ce_step(model, loss_fn, batch)
                (loss / step.num_valid_tokens).backward()
                step.add(loss, parts, batch)
            grad_norm = training.clip_grad_norm_(model.parameters(), cfg.clip_grad_norm)
            step.check_finite(grad_norm)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            optimizer.zero_grad(set_to_none=True)

            # Periodic work. The session does the rest that is due after a step (samples, checkpoints, signals).
            if step.is_validated:
                with session.paused():
                    step.log(validate(model, loss_fn, inputs.held_out, world, progress))
    session.finish()


def ce_step(model: models.Transformer, loss_fn: losses.KDLoss, batch: data.Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the cross entropy summed over the micro-batch's valid tokens, and its named parts."""
    hidden_BSD = model(**batch.inputs, return_hidden=True)
    return loss_fn(hidden_BSD, model.output, None, batch.targets)


def validate(
    model: models.Transformer,
    loss_fn: losses.KDLoss,
    held_out: list[data.Batch] | None,
    world: World,
    progress: runs.Progress,
) -> dict[str, float]:
    """Return the held-out cross entropy in nats per token; {} without held-out data."""
    if held_out is None:
        return {}
    found = evaluation.evaluate_ce(model, held_out, world=world, progress=progress.validating, loss=loss_fn)
    return {"val_class_loss": found["class_loss"]}


if __name__ == "__main__":
    main()
