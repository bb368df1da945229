"""docs/results.md says what its results file says: the table as the report writes it, and each number by the metric behind it."""

import json
import re
from functools import cache
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch

from kdtune import reports
from kdtune.config.load import read_yaml
from kdtune.models import smollm2_135m

ROOT = Path(__file__).parent.parent
# Without the section on regimes, which test_regime_results.py is about.
TEXT = re.sub(r"(?ms)^## Whose text .*?(?=^## )", "", (ROOT / "docs/results.md").read_text())
FOLDER = ROOT / "docs/results/smollm2_case_study"
RESULTS = FOLDER / "results.jsonl"
CONFIG = ROOT / "configs/sweeps/smollm2_case_study.yaml"
SWEEP = read_yaml(CONFIG)
CELLS = [json.loads(line) for line in RESULTS.read_text().splitlines()]

CE, KL, SAME = "held_out/class_loss", "held_out/kd_loss", "held_out/agreement"
TRUTHFULQA, HELLASWAG, COMMONSENSE = "truthfulqa_mc2_local/acc", "hellaswag_local/acc_norm", "commonsense_qa_local/acc"
DOLLY = "rouge/dolly"


def row(**axes: Any) -> list[dict[str, float]]:
    """The metrics of the cells with these axis values, by seed."""
    found = [cell["metrics"] for cell in CELLS if axes.items() <= cell["axes"].items()]
    assert found
    return found


def kd(kd_ratio: float, lr: float = 5e-4, teacher: str = "finetuned", **seed: int) -> list[dict[str, float]]:
    return row(model="kd", kd_ratio=kd_ratio, lr=lr, teacher=teacher, **seed)


SFT, KD_HALF, KD_MOST = row(model="sft", lr=5e-4), kd(0.5), kd(0.75)
TEACHER, TUNED, STUDENT = (row(model=name) for name in ("teacher", "finetuned_teacher", "student"))


def values(cells: list[dict[str, float]], metric: str) -> list[float]:
    return [cell[f"evaluate.{metric}"] for cell in cells]


def average(cells: list[dict[str, float]], metric: str) -> float:
    return mean(values(cells, metric))


def mean_and_error(cells: list[dict[str, float]], metric: str, form: str = ".3f", scale: float = 1.0) -> str:
    numbers = [scale * value for value in values(cells, metric)]
    return f"{mean(numbers):{form}} ± {stdev(numbers) / sqrt(len(numbers)):{form}}"


def in_errors(cells: list[dict[str, float]], metric: str) -> float:
    """The difference to SFT, paired by seed, in its standard errors."""
    pairs = [one - other for one, other in zip(values(cells, metric), values(SFT, metric), strict=True)]
    return mean(pairs) / (stdev(pairs) / sqrt(len(pairs)))


def against_sft(cells: list[dict[str, float]], metric: str, form: str = "+.3f", scale: float = 1.0) -> str:
    difference = scale * (average(cells, metric) - average(SFT, metric))
    return f"({difference:{form}}, {abs(in_errors(cells, metric)):.1f} s.e.)"


def listed(rows: list[list[dict[str, float]]], metric: str) -> str:
    """The metric of rows with one seed."""
    return ", ".join(f"{values(cells, metric)[0]:.3f}" for cells in rows)


def minutes(step: str) -> list[float]:
    """How long each run of a step took; a run that several cells share counts once."""
    runs = {cell["folders"][step]: cell["seconds"][step] / 60 for cell in CELLS if step in cell["seconds"]}
    return list(runs.values())


def setting(step: str, key: str) -> str:
    """The value that the sweep gives a key of a step."""
    texts = [text for one in SWEEP["steps"][step]["overrides"] for text in (one if isinstance(one, list) else [one])]
    (value,) = [text.partition("=")[2] for text in texts if text.startswith(f"{key}=")]
    return value


def measured() -> list[str]:
    """The words around each number that results.jsonl gives."""
    # Of one seed, to stand beside rows that have no other.
    sft, half, most = row(model="sft", lr=5e-4, seed=0), kd(0.5, seed=0), kd(0.75, seed=0)
    ratios = [sft, kd(0.25), half, most, kd(1.0)]
    best = {
        metric: min(zip((values(cells, metric)[0] for cells in ratios), (0, 0.25, 0.5, 0.75, 1), strict=True))[1]
        for metric in (KL, CE)
    }
    rates = (2e-4, 5e-4, 1e-3)
    sft_by_rate = [row(model="sft", lr=lr, seed=0) for lr in rates]
    kd_by_rate = [kd(0.5, lr, seed=0) for lr in rates]
    documents = [TEACHER[0][f"evaluate.{HELLASWAG}_stderr"], TEACHER[0][f"evaluate.{TRUTHFULQA}_stderr"]]
    steps = {folder for cell in CELLS for folder in cell["folders"].values()}
    total = sum(sum(minutes(step)) for step in SWEEP["steps"])
    assert all(
        average(cells, COMMONSENSE) == average(STUDENT, COMMONSENSE) for cells in (SFT, KD_HALF, KD_MOST, STUDENT)
    )
    assert average(SFT, HELLASWAG) == pytest.approx(average(KD_HALF, HELLASWAG)), "equal at 0.5"
    assert in_errors(KD_MOST, HELLASWAG) < 0, "SFT is ahead there"
    assert all(a > b for a, b in zip(values(SFT, CE), values(KD_HALF, CE), strict=True))
    return [
        f"| cross entropy, nats a token | {mean_and_error(SFT, CE)} | {mean_and_error(KD_HALF, CE)} {against_sft(KD_HALF, CE)} "
        f"| {mean_and_error(KD_MOST, CE)} {against_sft(KD_MOST, CE)} |",
        f"| KL to the finetuned teacher, nats a token | {mean_and_error(SFT, KL)} "
        f"| {mean_and_error(KD_HALF, KL)} {against_sft(KD_HALF, KL)} "
        f"| {mean_and_error(KD_MOST, KL)} {against_sft(KD_MOST, KL)} |",
        f"| same top token as that teacher | {mean_and_error(SFT, SAME, '.1f', 100)} % "
        f"| {mean_and_error(KD_HALF, SAME, '.1f', 100)} % {against_sft(KD_HALF, SAME, '+.1f', 100)} "
        f"| {mean_and_error(KD_MOST, SAME, '.1f', 100)} % {against_sft(KD_MOST, SAME, '+.1f', 100)} |",
        f"starts at {average(STUDENT, CE):.2f} nats and {average(STUDENT, KL):.2f} of KL.",
        f"would give KD truthfulqa_mc2 ({average(KD_HALF, TRUTHFULQA):.3f} and {average(KD_MOST, TRUTHFULQA):.3f} against "
        f"{average(SFT, TRUTHFULQA):.3f}, {in_errors(KD_HALF, TRUTHFULQA):+.1f} and {in_errors(KD_MOST, TRUTHFULQA):+.1f} s.e.)",
        f"at 0.5, ROUGE-L on Dolly ({average(KD_HALF, DOLLY):.1f} against {average(SFT, DOLLY):.1f}, "
        f"{in_errors(KD_HALF, DOLLY):+.1f} s.e.; {average(KD_MOST, DOLLY):.1f} at 0.75, {in_errors(KD_MOST, DOLLY):+.1f} s.e.)",
        f"hellaswag at 0.75 ({average(SFT, HELLASWAG):.3f} against {average(KD_MOST, HELLASWAG):.3f}, "
        f"{abs(in_errors(KD_MOST, HELLASWAG)):.1f} s.e.; equal at 0.5)",
        f"commonsense_qa is {average(SFT, COMMONSENSE):.3f} for all of them",
        f"a score moves by about {100 * mean(documents):.0f} points with the choice of documents alone, and the teacher itself is "
        f"at {average(TEACHER, HELLASWAG):.2f}, {average(TEACHER, TRUTHFULQA):.2f} and {average(TEACHER, COMMONSENSE):.2f}:",
        f"- kd_ratio 0, 0.25, 0.5, 0.75, 1 (seed 0): KL {listed(ratios, KL)}; cross entropy {listed(ratios, CE)}.",
        f"The more teacher the nearer to it, up to {best[KL]}; the data's own cross entropy is best at {best[CE]}.",
        f"(cross entropy {listed([kd(0.5, teacher='base')], CE)} against {listed([sft], CE)} of the same seed)",
        f"LoRA brings the teacher from {average(TEACHER, CE):.3f} to {average(TUNED, CE):.3f} nats",
        f"- Learning rates 2e-4, 5e-4, 1e-3 (seed 0): SFT {listed(sft_by_rate, CE)}; KD at kd_ratio 0.5 {listed(kd_by_rate, CE)}.",
        f"{len(CELLS)} cells, {len(steps)} steps, run to the end",
        f"Steps took {total:.0f} minutes in all: finetuning the teacher {mean(minutes('finetune_teacher')):.0f}, an "
        f"SFT run {mean(minutes('sft')):.1f}, a KD run {mean(minutes('kd')):.1f}, an evaluation {min(minutes('evaluate')):.0f} to "
        f"{max(minutes('evaluate')):.1f}.",
    ]  # fmt: skip


def configured() -> list[str]:
    """The words around each number that the sweep's configs give, or that follows from other numbers."""
    kd_config = read_yaml(ROOT / "configs/smollm2/knowledge_distillation_single_device.yaml")
    num_layers = read_yaml(ROOT / "configs/smollm2/prune.yaml")["num_layers"]
    steps, batch = int(setting("finetune_teacher", "max_steps_per_epoch")), kd_config["batch_size"]
    assert kd_config.get("gradient_accumulation_steps", 1) == 1
    held_out = setting("evaluate", "dataset_val.split").strip("train[-:]")
    documents, rouge = setting("evaluate", "limit"), setting("evaluate", "rouge")
    (answers,), (answer_tokens,) = re.findall(r"train\[:(\d+)\]", rouge), re.findall(r"max_new_tokens: (\d+)", rouge)
    last_training_row = int(setting("finetune_teacher", "dataset.split").strip("train[:-]"))
    rated, random = 4300, 9062
    with torch.device("meta"):
        model = smollm2_135m()
    whole = sum(p.numel() for p in model.parameters())
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.layers]
    pruned = whole - (len(layers) - num_layers) * layers[0]
    ratios = SWEEP["axes"]["kd_ratio"]
    lr, length = SWEEP["axes"]["lr"][0], setting("finetune_teacher", "tokenizer.max_seq_len")
    # Student's t for two degrees of freedom in closed form: a sqrt(2 / (1 - a^2)) is exceeded by |t| with chance 1 - a.
    bound = 0.95 * sqrt(2 / (1 - 0.95**2))
    repeated = sorted(
        {str(cell["axes"]["kd_ratio"]) for cell in CELLS if cell["axes"].get("kd_ratio") and cell["axes"].get("seed")}
    )
    rate = f"{lr:.0e}".replace("e-0", "e-")
    return [
        f"SmolLM2-{whole / 1e6:.0f}M-Instruct, {len(layers)} layers, distilled into {num_layers} of its layers "
        f"({pruned / 1e6:.0f}M parameters)",
        f"`{CONFIG.relative_to(ROOT)}`",
        f"Compared are {steps} steps of {batch} examples",
        f"`kd_ratio` 0), same student, data, order and learning rate {rate},",
        f"| on {held_out} held-out examples | SFT | KD, kd_ratio {ratios[0]} | KD, kd_ratio {ratios[1]} |",
        f"beyond the 5 % bound of Student's t for three pairs ({bound:.1f})",
        f"none reaches the {bound:.1f} that three pairs ask for",
        f"guessing gives {1 / 5} ± {sqrt(0.2 * 0.8 / int(documents)):.2f}.",
        f"With {documents} documents a task and {answers} answers",
        f"a student of {num_layers} layers after {steps * batch} examples",
        "kdtune run sweep --config sweeps/smollm2_case_study ",
        (ROOT / "configs/smollm2/prune.yaml").read_text().split("\n#   ")[1].split("\n")[0],
        f"[{HELLASWAG.split('/')[0]},{TRUTHFULQA.split('/')[0]},{COMMONSENSE.split('/')[0]}]",
        f"Alpaca: {random + rated:,} of its rows for training (a random {random:,}, and {rated:,} that a model rated highly), "
        f"{held_out} others held out.",
        f"Dolly: {answers} of 500 held-out questions.",
        f"{steps} steps of {batch} examples ({steps * batch} of {random + rated - last_training_row:,}) of at most {length} tokens",
        f"three seeds for SFT and for kd_ratio {' and '.join(repeated)}, one for the rest",
        f"{held_out} held-out examples; the first {documents} documents of each task; {answers} answers of at most {answer_tokens} tokens",
        f"`sweeps/{sorted(ROOT.glob('configs/sweeps/case_study_table?.yaml'))[0].stem}` to "
        f"`{sorted(ROOT.glob('configs/sweeps/case_study_table?.yaml'))[-1].stem.removeprefix('case_study_')}` are ready",
        *(f"]({path.relative_to(ROOT / 'docs')})" for path in FOLDER.iterdir()),
        f"[{FOLDER.relative_to(ROOT / 'docs')}]",
    ]  # fmt: skip


# What no file of the repository has: where and with what it was run, and the names of the large models.
GIVEN = [
    "on two cores of an x86-64 CPU in fp32",
    "set.evaluate.rouge.0.source=dolly/dolly_eval_500.jsonl",
    '"set.evaluate.rouge.0.column_map={',
    "Python 3.11.7, torch 2.13.0 (CPU), torchao 0.18.0, tokenizers 0.23.3, safetensors 0.8.0, datasets 5.2.0, lm-eval 0.4.13; "
    "kdtune at commit da13241.",
    "up to 0.1 % too small; it has been put right since",
    "## The study with Llama 3.1 8B and Llama 3.2 1B",
    "they need a GPU of 80 GB",
]


@cache
def phrases(folder: Path) -> list[str]:
    """All that the text may say with a digit in it: the table of the report, and what is above."""
    reports.write_report(RESULTS, folder, title="any", metrics=SWEEP["metrics"], baseline=SWEEP["baseline"])
    (table,) = re.findall(r"## Results\n\n((?:\|.*\n)+)", (folder / "report.md").read_text())
    return [table, *measured(), *configured(), *GIVEN]


@cache
def patterns(folder: Path) -> list[tuple[str, re.Pattern[str]]]:
    """Each phrase with what finds it, wherever its lines are broken."""
    return [(phrase, re.compile(r"\s+".join(map(re.escape, phrase.split())))) for phrase in phrases(folder)]


def unexplained(text: str, folder: Path) -> list[str]:
    """The phrases that a text lacks, and its digits that are in none of them."""
    found, covered = [], bytearray(len(text))
    for phrase, pattern in patterns(folder):
        places = [place.span() for place in pattern.finditer(text)]
        if not places and not phrase.startswith("]("):  # not every file of the results is linked
            found.append(f"not in the text: {phrase}")
        for start, end in places:
            covered[start:end] = b"\1" * (end - start)
    return found + [
        f"no phrase has: {text[max(0, digits.start() - 30) : digits.end() + 10]!r}"
        for digits in re.finditer(r"\d+", text)
        if not all(covered[digits.start() : digits.end()])
    ]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report")


def test_every_number_of_the_text_is_what_its_source_gives(report: Path) -> None:
    assert unexplained(TEXT, report) == []


def test_the_shipped_report_has_the_same_tables(report: Path) -> None:
    table = phrases(report)[0]
    shipped, made = ((folder / "report.md").read_text() for folder in (FOLDER, report))
    assert table in shipped and made.split("## Difference")[1].split("![")[0] in shipped


def test_another_last_digit_is_noticed(report: Path) -> None:
    for digits in re.finditer(r"\d+", TEXT):
        last = digits.end() - 1
        for change in (1, 9):
            changed = f"{TEXT[:last]}{(int(TEXT[last]) + change) % 10}{TEXT[last + 1 :]}"
            assert unexplained(changed, report), f"{changed[digits.start() - 20 : digits.end() + 20]!r} passes"
