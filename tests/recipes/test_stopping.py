"""What is written of a base model trained on conversations stops after an answer, and carries the template. Witness: transformers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from kdtune.checkpoint import load_model, save_model
from kdtune.data import DatasetStats, TokenizedDataset
from kdtune.models import llama
from kdtune.tokenizers import load

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

ROWS = [("Capital of France?", "Paris."), ("Two plus two?", "Four."), ("A colour?", "Blue.")]
END_OF_TEXT, START, END = 256, 257, 258
OWN_FILES = ["tokenizer.json", "tokenizer_config.json"]


def write_tokenizer(folder: Path, *, bos: str, eos: str, **more: str) -> None:
    """The bytes and ChatML's tokens; without a chat template where `more` has none."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos, **more}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model's folder, whose files know one end, <|endoftext|>, and no chat."""
    folder = tmp_path_factory.mktemp("base") / "base"
    torch.manual_seed(0)
    model = llama(
        vocab_size=259, embed_dim=32, num_layers=2, num_heads=2, num_kv_heads=2, intermediate_dim=64, max_seq_len=128
    )
    save_model(model, folder)
    ids = {"bos_token_id": END_OF_TEXT, "eos_token_id": END_OF_TEXT, "pad_token_id": None}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **ids}))
    (folder / "generation_config.json").write_text(json.dumps(ids))
    write_tokenizer(folder, bos="<|endoftext|>", eos="<|endoftext|>")
    return folder


@pytest.fixture(scope="module")
def train(base: Path, tmp_path_factory: pytest.TempPathFactory, cli: Callable[..., Any]) -> Callable[..., Path]:
    """Learns the rows by heart and gives the run's folder."""
    place = tmp_path_factory.mktemp("runs")
    rows = [{"input": question, "output": answer, "text": question} for question, answer in ROWS]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "config.yaml").write_text(f"""recipe: finetune
tokenizer: {{_component_: kdtune.tokenizers.load, path: {base}, max_seq_len: 128}}
checkpointer: {{_component_: kdtune.checkpoint.Checkpointer, checkpoint_dir: {base}}}
device: cpu
dtype: fp32
dataset: {{_component_: kdtune.data.instruct_dataset, source: {place / "rows.jsonl"}}}
optimizer: {{_component_: torch.optim.AdamW, lr: 1.0e-2}}
epochs: 40
save_every_n_steps: 40
""")

    def run(name: str, *overrides: str) -> Path:
        ended = cli("run", "finetune", "--config", str(place / "config.yaml"), f"output_dir={place / name}", *overrides)
        assert ended.code == 0, ended.err
        return place / name

    return run


def check_answers(folder: Path, model: Any) -> None:
    """transformers' template is the one that was trained with, and its generation ends with the answer."""
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), load(folder)
    for question, answer in ROWS:
        chat = [{"role": "user", "content": question}]
        assert theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == ours.render(
            chat, add_generation_prompt=True
        )
        prompt = theirs.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        new = model.generate(prompt, max_new_tokens=40, do_sample=False)[0, prompt.shape[1] :].tolist()
        assert new == [*theirs(answer).input_ids, END]


def said_ids(folder: Path, name: str) -> dict[str, Any]:
    document = json.loads((folder / name).read_text())
    return {key: value for key, value in document.items() if key.endswith("_token_id")}


def test_own_tokenizer(train: Callable[..., Path]) -> None:
    out = train("own")
    for folder in (out / "step_40", out / "final"):
        check_answers(folder, transformers.AutoModelForCausalLM.from_pretrained(folder))
        ids = {"bos_token_id": END_OF_TEXT, "eos_token_id": [END_OF_TEXT, END], "pad_token_id": END_OF_TEXT}
        assert said_ids(folder, "config.json") == said_ids(folder, "generation_config.json") == ids
        assert load(folder).eos_id == END_OF_TEXT


def test_adapters(train: Callable[..., Path], base: Path, tmp_path: Path) -> None:
    """On a base that knows the answers, with the files of one that knows no chat: a random one learns too little by adapters."""
    knowing = tmp_path / "knowing"
    shutil.copytree(base, knowing)
    knows = train("knows", "save_every_n_steps=null") / "final"
    shutil.copyfile(knows / "model.safetensors", knowing / "model.safetensors")
    out = train(
        "adapters", f"checkpointer.checkpoint_dir={knowing}", f"tokenizer.path={knowing}", "adapter=kdtune.models.apply_lora",
        "adapter.lora_rank=4", "adapter.lora_alpha=8", "epochs=2", "optimizer.lr=1e-4", "save_every_n_steps=2",
    )  # fmt: skip
    check_answers(out / "final", transformers.AutoModelForCausalLM.from_pretrained(out / "final"))
    for folder in (out / "step_2", out / "final" / "adapter"):
        model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(knowing), folder)
        # peft keeps the base's generation config; the one to use lies beside the adapter.
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
        check_answers(folder, model)


def test_the_tokenizer_of_another_folder(train: Callable[..., Path], tmp_path: Path) -> None:
    chat = tmp_path / "chat"
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
    )
    write_tokenizer(chat, bos="<|im_start|>", eos="<|im_end|>", chat_template=template)
    final = train("foreign", f"tokenizer.path={chat}") / "final"
    check_answers(final, transformers.AutoModelForCausalLM.from_pretrained(final))
    assert load(final).chat_template == template
    ids = {"bos_token_id": START, "eos_token_id": [END, END_OF_TEXT], "pad_token_id": END}
    assert said_ids(final, "config.json") == said_ids(final, "generation_config.json") == ids
    for name in OWN_FILES:
        assert (final / name).read_bytes() == (chat / name).read_bytes()


def test_the_token_after_an_answer_is_read_from_the_template(train: Callable[..., Path], tmp_path: Path) -> None:
    """<|endoftext|> is the eos, and the template ends a turn with a token that no list of ours has."""
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_start|>{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    write_tokenizer(tmp_path / "odd", bos="<|endoftext|>", eos="<|endoftext|>", chat_template=template)
    final = train("odd", f"tokenizer.path={tmp_path / 'odd'}") / "final"
    assert said_ids(final, "generation_config.json")["eos_token_id"] == [END_OF_TEXT, START]


@pytest.fixture
def texts(base: Path) -> Path:
    (base.parent / "texts.txt").write_text("A text.\n\nAnother one.\n")
    return base.parent / "texts.txt"


@pytest.mark.parametrize("val", ["texts", "conversations"])
def test_texts_do_not_make_a_chat_model(train: Callable[..., Path], base: Path, texts: Path, val: str) -> None:
    """Whatever it is validated on."""
    overrides = ["dataset=kdtune.data.text_completion_dataset", f"dataset.source={texts}"]
    if val == "conversations":
        rows = texts.with_name("val.jsonl")
        rows.write_text(json.dumps({"input": "A?", "output": "B."}) + "\n")
        overrides += ["dataset_val=kdtune.data.instruct_dataset", f"dataset_val.source={rows}"]
    final = train(f"texts_{val}", *overrides, "epochs=1", "save_every_n_steps=null") / "final"
    assert transformers.AutoTokenizer.from_pretrained(final).chat_template is None
    for name in ("config.json", "generation_config.json"):
        assert said_ids(final, name) == said_ids(base, name)
    for name in OWN_FILES:
        assert (final / name).read_bytes() == (base / name).read_bytes()


@pytest.mark.parametrize(("streaming", "mixed"), [("true", False), ("false", True), ("true", True)])
def test_streamed_and_mixed_conversations_make_a_chat_model(
    train: Callable[..., Path],
    texts: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    streaming: str,
    mixed: bool,
) -> None:
    dataset = f"{{_component_: kdtune.data.instruct_dataset, source: rows.jsonl, streaming: {streaming}}}"
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps({"input": q, "output": a}) + "\n" for q, a in ROWS))
    if mixed:
        text_part = f"{{_component_: kdtune.data.text_completion_dataset, source: {texts}}}"
        dataset = f"{{_component_: kdtune.data.mixed_dataset, weights: [1, 1], datasets: [{text_part}, {dataset}]}}"
    out = train(tmp_path.name, f"dataset={dataset}", "epochs=1", "max_steps_per_epoch=1", "save_every_n_steps=1")
    for folder in (out / "step_1", out / "final"):
        assert transformers.AutoTokenizer.from_pretrained(folder).chat_template == load(folder).chat_template
        assert said_ids(folder, "generation_config.json")["eos_token_id"] == [END_OF_TEXT, END]


def test_rows_made_in_python_say_what_they_are(base: Path, tmp_path: Path) -> None:
    tokenizer = load(base)
    chat = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "B."}]
    for is_chat in (False, True):
        rows = TokenizedDataset([tokenizer.tokenize_messages(chat)], DatasetStats("mine"), is_chat=is_chat)
        folder = tmp_path / str(is_chat)
        save_model(load_model(base), folder, base=base, tokenizer=tokenizer, is_chat=rows.is_chat)
        assert (folder / "chat_template.jinja").exists() == is_chat
        ends = said_ids(folder, "generation_config.json")["eos_token_id"]
        assert ends == ([END_OF_TEXT, END] if is_chat else END_OF_TEXT)


def test_pruning_on_conversations_trains_nothing(
    base: Path, train: Callable[..., Path], tmp_path: Path, cli: Callable[..., Any]
) -> None:
    rows = train("for_rows", "epochs=1", "save_every_n_steps=null").parent / "rows.jsonl"
    ended = cli(
        "run", "prune", "--config", "smollm2/prune", f"output_dir={tmp_path / 'pruned'}", f"checkpointer.checkpoint_dir={base}",
        f"tokenizer.path={base}",
        "dataset=kdtune.data.instruct_dataset", f"dataset.source={rows}", "num_layers=1", "dtype=fp32", "device=cpu",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    assert not (tmp_path / "pruned" / "chat_template.jinja").exists()
    assert said_ids(tmp_path / "pruned", "generation_config.json") == said_ids(base, "generation_config.json")
