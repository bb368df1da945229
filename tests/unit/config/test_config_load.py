"""YAML files and overrides through the validation stages into a config."""

from collections.abc import Callable
from pathlib import Path

import pytest
from config_samples import Config

from kdtune.config import ConfigError, check_machine, load, resolved_yaml, to_yaml
from kdtune.config.load import as_values, read_yaml


@pytest.fixture
def findings(base: Path) -> Callable[..., list[str]]:
    """The lines of the ConfigError that the base config with these overrides and added text gives, head line first."""

    def collect(*overrides: str, text: str = "") -> list[str]:
        base.write_text(base.read_text() + text)
        with pytest.raises(ConfigError) as error:
            load(base, list(overrides), Config)
        return str(error.value).splitlines()

    return collect


def test_fills_the_schema(base: Path) -> None:
    cfg = load(base, ["kd_ratio=1", "resume=some/where", "prompts=[a, b]"], Config)
    assert isinstance(cfg, Config)
    assert cfg.kd_ratio == 1.0 and type(cfg.kd_ratio) is float
    assert cfg.resume == Path("some/where")
    assert cfg.prompts == ["a", "b"]
    assert cfg.tokenizer == {"_component_": "config_samples.Tokenizer", "path": "runs/x/tok"}
    assert type(cfg.tokenizer) is dict
    assert cfg.log_dir == "runs/x/logs"
    assert cfg.lr_scheduler is None


def test_interpolations_follow_overrides(base: Path) -> None:
    cfg = load(base, ["output_dir=elsewhere", "prompts=['${dtype}', '\\${dtype}']"], Config)
    assert cfg.tokenizer["path"] == "elsewhere/tok"
    assert cfg.log_dir == "elsewhere/logs"
    assert cfg.prompts == ["bf16", "${dtype}"]


def test_defaults_that_are_components_are_changed_not_replaced(base: Path) -> None:
    assert load(base, ["optimizer.lr=2"], Config).optimizer == {
        "_component_": "config_samples.Optimizer", "lr": 2, "betas": [0.8, 0.9],
    }  # fmt: skip
    base.write_text(base.read_text() + "optimizer: {lr: 3}\n")
    assert load(base, [], Config).optimizer["betas"] == [0.8, 0.9]
    assert load(base, [], Config).optimizer["lr"] == 3


def test_a_default_is_not_shared_between_loads(base: Path) -> None:
    load(base, [], Config).optimizer["lr"] = 99
    assert load(base, [], Config).optimizer["lr"] == 0.1


def test_gates_two_and_three_report_everything_at_once(findings: Callable[..., list[str]]) -> None:
    lines = findings(
        "gradient_acumulation_steps=2", "batch_size=big", "dtype=fp64", "~output_dir", "dataset.sorce=x",
        "optimizer=a.B",
        "tokenizer.path=${nope}", "fsdp_cpu_offload=true", "lr_scheduler=3",
    )  # fmt: skip
    text = "\n".join(lines)
    assert lines[0].endswith("base.yaml: 10 problems")
    assert len(lines) == 11
    for words in (
        "gradient_acumulation_steps: unknown key; did you mean 'gradient_accumulation_steps'?",
        "batch_size: 'big' (str) is not allowed; must be int",
        "dtype: 'fp64' (str) is not allowed; must be one of 'fp32', 'bf16'",
        "output_dir: is missing",
        "dataset.sorce: config_samples.Dataset has no such argument",
        "optimizer: 'a.B' cannot be found: no module named 'a'",
        "tokenizer.path: Interpolation key 'nope' not found",
        "log_dir: Interpolation key 'output_dir' not found",
        "fsdp_cpu_offload: use parallelism.cpu_offload",
        "lr_scheduler: 3 is not a component",
    ):
        assert words in text


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("tokenizer=null", "tokenizer: is null; the recipe needs a component here"),
        ("~tokenizer._component_", "tokenizer: has no _component_"),
        ("output_dir='???'", "output_dir: is missing"),
        ("~output_dir", "output_dir: "),
        ("optimizer.params=[1]", "optimizer.params: is given by the recipe; remove it"),
        ("optimizer.lr='???'", "optimizer.lr: has no value"),
        ("clip_grad_norm=None", "clip_grad_norm: 'None' (str) is not allowed; must be float or null; write null"),
        ("batch_size=1.5", "batch_size: 1.5 is not allowed; must be int"),
        ("prompts=[1]", "prompts: item 0: 1 is not allowed; must be str"),
        ("kd_ratio='${oc.nothing:1}'", "kd_ratio: Unsupported interpolation type"),
        ("kd_ratio='${a'", "kd_ratio: "),
        ("recipe=other", "recipe: unknown key"),
        ("checkpointer.model_type=LLAMA3", "checkpointer: unknown key"),
        ("lr_scheduler=None", "lr_scheduler: 'None' (str) is not a component; write null for none"),
        ("lr_scheduler=[3]", "lr_scheduler.0: 3 is not a component"),
        ("lr_scheduler._component_=config_samples.Tokenizer", "does not take 'optimizer', which the recipe gives it"),
    ],
)
def test_gates_two_and_three_name_the_key(findings: Callable[..., list[str]], override: str, words: str) -> None:
    assert any(words in line for line in findings(override))


def test_gate_one_overrides_come_first(findings: Callable[..., list[str]]) -> None:
    lines = findings("--kd_ratio=0.7", "~nothing", "unknown=1")
    assert len(lines) == 3
    assert "no leading dashes; write kd_ratio=0.7" in lines[1]


def test_the_fourth_stage_reports_the_schemas_problems(findings: Callable[..., list[str]]) -> None:
    lines = findings("kd_ratio=3", "batch_size=0")
    assert lines[0].endswith("2 problems")
    assert "kd_ratio=3.0: must lie between 0 and 1" in lines[1]


def test_gate_five_is_asked_apart(base: Path) -> None:
    check_machine(load(base, [], Config), base)
    cfg = load(base, ["output_dir=nowhere"], Config)
    with pytest.raises(ConfigError, match="1 problem\n  output_dir: no disk"):
        check_machine(cfg, base)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: 1\na: 2\n", "bad.yaml:2: not valid YAML: found duplicate key a"),
        ("a: 1\nb: [1, 2\nc: 3\n", "bad.yaml:3: not valid YAML"),
        ("a: 1\n  b: 2\n", "bad.yaml:2: not valid YAML"),
        ("- a\n- b\n", "holds a list; a config is a mapping"),
        ("1: x\n", "key 1 is not a string"),
        ("a: !!python/object:os.system x\n", "bad.yaml:1: not valid YAML"),
        ("just text\n", "bad.yaml"),
        ("5\n", "bad.yaml"),
    ],
)
def test_gate_one_names_file_and_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        load(path, [], Config)
    assert words in str(error.value)


def test_files_that_are_not_text(tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(b"\xff\xfe\x00\x9f")
    with pytest.raises(ConfigError, match=r"bad\.yaml: cannot be read"):
        load(path, [], Config)
    with pytest.raises(ConfigError, match="no such file"):
        load(tmp_path / "missing.yaml", [], Config)
    with pytest.raises(ConfigError, match="unknown config"):
        load(tmp_path, [], Config)


def test_numbers_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "numbers.yaml"
    path.write_text("a: 1e-4\nb: '1e-4'\nc: 0x1F\nd: .inf\ne: 2024-01-01\nf: y\ng: '010'\nh: 2001:db8::1\n")
    values = read_yaml(path)
    assert values == {
        "a": 1e-4, "b": "1e-4", "c": 31, "d": float("inf"), "e": "2024-01-01", "f": "y", "g": "010", "h": "2001:db8::1",
    }  # fmt: skip


def test_an_empty_file_misses_everything(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(ConfigError) as error:
        load(tmp_path / "empty.yaml", [], Config)
    assert {line.split(":")[0].strip() for line in str(error.value).splitlines()[1:]} >= {
        "output_dir", "tokenizer", "dataset",
    }  # fmt: skip


def test_the_resolved_config_loads_back_equal(base: Path, tmp_path: Path) -> None:
    overrides = [
        "prompts=['\\${dtype}', '1e-5', 'null', 'a: b', ''] ",
        "optimizer.lr=1e-5",
        "resume=a/b",
        "clip_grad_norm=1e22",
    ]
    cfg = load(base, overrides, Config)
    assert cfg.prompts[0] == "${dtype}"
    again = tmp_path / "config.yaml"
    again.write_text(resolved_yaml(cfg))
    assert load(again, [], Config) == cfg


def test_docs_stand_above_their_keys(base: Path) -> None:
    from kdtune.config import field_docs

    docs = field_docs(Path(__file__).with_name("config_samples.py").read_text(), "Config")
    text = to_yaml(as_values(load(base, [], Config)), docs)
    assert "# Weight of the divergence, between 0 and 1.\nkd_ratio: 0.5\n" in text


@pytest.mark.parametrize(
    ("text", "finding"),
    [
        ("a: 1\nseed: 010\n", ":2: 010 can be read in more than one way; write 10 or 8 (octal), or '010' in quotes where text is meant"),
        ("a:\n- 190:20:30\n", ":2: 190:20:30 can be read in more than one way; write 685230, or"),
        ("a: {b: NO}\n", ":1: NO can be read in more than one way; write false, or 'NO' in quotes"),
        ("\non: 1\n", ":2: on can be read in more than one way; write true, or 'on' in quotes"),
        ("a: " + "[" * 2_000 + "]" * 2_000, ":1: not valid YAML: nested deeper than 64 levels"),
        ("a: " + "[" * 100_000, ":1: not valid YAML: nested deeper than 64 levels"),
        ("a: &a [*a]\n", ":1: not valid YAML: nested deeper than 64 levels"),
        ("".join(f"k{i}: &k{i} [{', '.join([f'*k{i - 1}' if i else 'x'] * 10)}]\n" for i in range(9)),
         "not valid YAML: its aliases stand for more than 100,000 values"),
        ("a: " + "9" * 5_000, ": cannot be read as YAML: Exceeds the limit"),
        ("word\n", ": holds a value; a config is a mapping of keys to values"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_meant_are_refused(text: str, finding: str, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        read_yaml(tmp_path / "a.yaml")
    assert finding in str(error.value)


def test_aliases_and_merge_keys_are_yaml(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: &a {lr: 1, betas: [1, 2]}\nb: {<<: *a, lr: 2}\nc: *a\n", encoding="utf-8-sig")
    a = {"lr": 1, "betas": [1, 2]}
    assert read_yaml(tmp_path / "a.yaml") == {"a": a, "b": {**a, "lr": 2}, "c": a}
