"""lm-eval tasks of our own in a folder: multiple choice by endings and by letters, whole texts, generated answers."""

import json
from pathlib import Path

THINGS = [
    "river",
    "copper kettle",
    "old bicycle",
    "market",
    "lamp",
    "garden wall",
    "letter",
    "violin",
    "bridge",
    "harvest",
]
ENDINGS = [" was sold.", " stands by the road", "'s colour faded slowly in the sun", " and nobody knew why it had come"]
QUESTION = "Question: Where would you look for the {{thing}}?\\nA. {{c[0]}}\\nB. {{c[1]}}\\nC. {{c[2]}}\\nAnswer:"

FILES = {
    "endings": """
output_type: multiple_choice
doc_to_text: "Long ago, the {{thing}}"
doc_to_target: label
doc_to_choice: endings
target_delimiter: ""
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "letters": f"""
output_type: multiple_choice
doc_to_text: "{QUESTION}"
doc_to_target: letter
doc_to_choice: [A, B, C]
fewshot_split: examples
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""",
    "texts": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{story}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
""",
    "answers": """
output_type: generate_until
doc_to_text: "The {{thing}} is"
doc_to_target: "{{thing}}"
generation_kwargs: {until: ["\\n", "e"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
}


def document(number: int) -> dict[str, object]:
    thing = f"{THINGS[number % len(THINGS)]} {number}"
    story = " ".join(f"The {THINGS[(number + i) % len(THINGS)]} came {i} days later." for i in range(1 + number % 5))
    return {"thing": thing, "endings": ENDINGS, "label": number % 4, "letter": number % 3, "story": story,
            "c": ["in a house", "near water", f"on shelf {number}"]}  # fmt: skip


def write_tasks(folder: Path, num_documents: int = 12) -> Path:
    """The folder with the task files own_endings, own_letters, own_texts and own_answers and their documents."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("test", num_documents), ("examples", 6)):
        lines = [json.dumps(document(number)) for number in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    for name, body in FILES.items():
        write_task(folder, f"own_{name}", body)
    return folder


def write_task(folder: Path, name: str, body: str, split: str = "test") -> None:
    """A task file that reads the folder's documents."""
    head = f"""task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/test.jsonl, examples: {folder}/examples.jsonl}}}}
test_split: {split}
"""
    (folder / f"{name}.yaml").write_text(head + body.lstrip())
