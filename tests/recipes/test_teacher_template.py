"""A teacher that was trained on one chat template, and a student's data in another: what stops the run, and what does not."""

import json
import math
from pathlib import Path

from command_line import CLI

from kdtune.tokenizers import byte_tokenizer

OTHER = (
    "{% for message in messages %}[{{ message.role }}]: {{ message.content }}\n"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]: {% endif %}"
)

DATA = [
    f"{key}.{setting}"
    for key in ("dataset", "dataset_val")
    for setting in ("prompt=plain", "train_on=answers", "truncation=right")
]


def test_a_teacher_with_another_chat_template_is_refused_and_its_loss_would_not_tell(cli: CLI, tmp_path: Path) -> None:
    own, teacher = tmp_path / "tokenizer", tmp_path / "teacher"
    byte_tokenizer().save(own, is_chat=True)
    (own / "chat_template.jinja").write_text(OTHER)
    tokenizer = ["tokenizer=kdtune.tokenizers.load", f"tokenizer.path={own}", "tokenizer.max_seq_len=256"]
    learned = cli("run", "finetune", "--config", "tiny/finetune", "~adapter", *tokenizer, *DATA, f"output_dir={teacher}",
                  "max_steps_per_epoch=15", "sample_prompts=[]", "save_every_n_steps=null", "run_val_every_n_steps=null")  # fmt: skip
    assert learned.code == 0, learned.err
    run = ["run", "knowledge_distillation", "--config", "tiny/on_policy", "~teacher_model", "sample_prompts=[]",
           "teacher_checkpointer=kdtune.checkpoint.Checkpointer", f"teacher_checkpointer.checkpoint_dir={teacher / 'final'}",
           "~lr_scheduler", "max_steps_per_epoch=1", "save_every_n_steps=null", "rollouts.guards.max_teacher_loss=1.0",
           "rollouts.max_new_tokens=4"]  # fmt: skip
    refused = cli(*run, f"output_dir={tmp_path / 'refused'}")
    assert refused.code == 2
    assert "the teacher has another chat template, so it is asked in a format that is not its own" in refused.err
    assert f"tokenizer.path={teacher / 'final'} takes its format" in refused.err
    assert "rollouts.guards.same_template=false" in refused.err
    assert not (tmp_path / "refused").exists()

    losses = {}
    for name, more in (
        ("other", ["rollouts.guards.same_template=false"]),
        ("own", tokenizer),
    ):
        done = cli(*run, *more, f"output_dir={tmp_path / name}")
        assert done.code == 0, done.err
        assert ("another chat template" in done.err) == (name == "other")
        losses[name] = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])[
            "val_teacher_class_loss"
        ]
    # It has learned the language of the answers, whatever comes before them: far below the guard against a broken teacher.
    assert max(losses.values()) < 0.9 * math.log(320)
