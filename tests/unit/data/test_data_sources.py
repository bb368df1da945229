import gzip
import json

import pytest
from datasets import Dataset as HFDataset

from kdtune.data import Source, open_rows
from kdtune.data.sources import read_lines, read_stream, split_parts
from kdtune.errors import ConfigError, DataError

ROWS = [{"a": f"x{n}", "b": n} for n in range(10)]


def rows_of(*args, **kwargs):
    return [dict(row) for row in open_rows(Source(*args, **kwargs))]


def test_a_path_as_source(jsonl):
    assert rows_of(jsonl(ROWS)) == ROWS


def test_json_with_data_files(jsonl):
    assert rows_of("json", data_files=jsonl(ROWS)) == ROWS


def test_json_array_and_gzip(tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps(ROWS, indent=1))
    with gzip.open(tmp_path / "rows.jsonl.gz", "wt") as file:
        file.write("\n".join(map(json.dumps, ROWS)))
    assert rows_of(str(tmp_path / "rows.json")) == rows_of(str(tmp_path / "rows.jsonl.gz")) == ROWS


def test_csv_cells_stay_text(tmp_path):
    # What pandas would make of these: 7.0, None, None.
    (tmp_path / "rows.csv").write_text('\ufeffa,b\nx,007\ny,\nz,None\n"p, q","two\nlines"\n', encoding="utf-8")
    expected = [("x", "007"), ("y", ""), ("z", "None"), ("p, q", "two\nlines")]
    assert [tuple(row.values()) for row in rows_of(str(tmp_path / "rows.csv"))] == expected
    assert rows_of("csv", data_files=str(tmp_path / "rows.csv"))[0] == {"a": "x", "b": "007"}


def test_parquet_and_text(tmp_path):
    HFDataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "rows.txt").write_text("one\ntwo\n")
    assert rows_of(str(tmp_path / "rows.parquet")) == ROWS
    assert rows_of("parquet", data_files=str(tmp_path / "*.parquet")) == ROWS
    assert rows_of("text", data_files=str(tmp_path / "rows.txt")) == [{"text": "one"}, {"text": "two"}]


def test_several_files_patterns_folders_and_splits(jsonl, tmp_path):
    first, second = jsonl(ROWS[:4], "1.jsonl"), jsonl(ROWS[4:], "2.jsonl")
    assert rows_of("json", data_files=[first, second]) == ROWS
    assert rows_of("json", data_files=str(tmp_path / "*.jsonl")) == ROWS
    assert rows_of("json", data_dir=str(tmp_path)) == ROWS
    assert rows_of("json", data_dir=str(tmp_path), data_files="2.jsonl") == ROWS[4:]
    by_split = {"train": first, "test": second}
    assert rows_of("json", data_files=by_split, split="test") == ROWS[4:]
    assert rows_of("json", data_files=by_split, split="train[:2]+test[-1:]") == [ROWS[0], ROWS[1], ROWS[9]]


def test_rows_are_what_the_lines_say_whatever_the_other_rows_hold(jsonl):
    # One type a column is inferred by `datasets`, which hands out '"b"' for the text "b" here.
    first, second = jsonl([{"o": "a"}], "1.jsonl"), jsonl([{"o": "b"}, {"o": 3}], "2.jsonl")
    assert rows_of("json", data_files=[first, second]) == [{"o": "a"}, {"o": "b"}, {"o": 3}]


@pytest.mark.parametrize(
    ("split", "expected"),
    [("train", ROWS), ("train[:90%]", ROWS[:9]), ("train[90%:]", ROWS[9:]), ("train[2:4]", ROWS[2:4])],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_split_expressions(jsonl, tmp_path, split, expected, kind):
    path = jsonl(ROWS)
    if kind == "parquet":
        path = str(tmp_path / "rows.parquet")
        HFDataset.from_list(ROWS).to_parquet(path)
    assert rows_of(path, split=split) == expected


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("split", "streaming"), [("validation", False), ("validation[:50%]", False), ("validation", True)]
)
def test_unknown_split_lists_the_splits(jsonl, tmp_path, kind, split, streaming):
    path = jsonl(ROWS)
    if kind == "parquet":
        path = str(tmp_path / "rows.parquet")
        HFDataset.from_list(ROWS).to_parquet(path)
    with pytest.raises(DataError, match=r"validation.*train"):
        rows_of(path, split=split, streaming=streaming)


def test_malformed_split(jsonl):
    with pytest.raises(DataError, match=r"Unrecognized instruction format: train\[:5x%\]"):
        rows_of(jsonl(ROWS), split="train[:5x%]")
    assert split_parts("train[1:3]", ["train"], "s", {"train": 10}) == [("train", 1, 3)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}\n\n{"a": oops}\n', "bad.jsonl, line 3: invalid JSON: Expecting value at column 7"),
        ('{"a": 1}\n[1]\n', "bad.jsonl, line 2: a row must be a JSON object: found list"),
        ('[{"a": 1},\n {"a": 2}', "bad.jsonl, line 2: invalid JSON"),
        ('[{"a": 1}, 5]', "bad.jsonl, element 2: a row must be a JSON object: found int"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_bad_json_names_file_and_line(tmp_path, text, message, streaming):
    (tmp_path / "bad.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        rows_of(str(tmp_path / "bad.jsonl"), streaming=streaming)


def test_not_utf8(tmp_path):
    (tmp_path / "bad.jsonl").write_bytes(b'{"a": "\xff"}\n')
    with pytest.raises(DataError, match=r"bad.jsonl: not UTF-8 text"):
        rows_of(str(tmp_path / "bad.jsonl"))


@pytest.mark.parametrize("streaming", [False, True])
def test_corrupt_parquet_is_named(tmp_path, streaming):
    (tmp_path / "bad.parquet").write_text("not parquet")
    with pytest.raises(DataError, match=r"bad.parquet \(train\): .*[Pp]arquet"):
        list(read_stream(open_rows(Source(str(tmp_path / "bad.parquet"), streaming=streaming)), "bad.parquet (train)"))


def test_a_file_of_another_kind_is_not_called_missing(tmp_path):
    (tmp_path / "notes.md").write_text("text")
    with pytest.raises(ConfigError, match=r"notes\.md: a file of no known kind; \.json.*source=text .*data_files="):
        open_rows(Source(str(tmp_path / "notes.md")))


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"source": "no/such.jsonl"}, DataError, "source=no/such.jsonl: no such file"),
        ({"source": "./no-such-folder"}, DataError, "source=./no-such-folder: no such file or folder"),
        ({"source": "json", "data_files": "nothing.jsonl"}, DataError, "data_files=nothing.jsonl: no such file"),
        ({"source": "json", "data_files": "none*.jsonl"}, DataError, r"data_files=none\*.jsonl: no such file"),
        ({"source": "json", "data_dir": "nowhere"}, DataError, "data_dir=nowhere: no such folder"),
        ({"source": "json"}, ConfigError, "source=json: needs data_files"),
        (
            {"source": "json", "name": "x", "data_files": "a"},
            ConfigError,
            "name=x: names a configuration of a hub dataset",
        ),
        (
            {"source": "a.jsonl", "data_files": "b.jsonl"},
            ConfigError,
            "data_files=b.jsonl: has no effect when source is a",
        ),
        ({"source": "a.jsonl", "shuffle_buffer": 5}, ConfigError, "shuffle_buffer=5: .*only with streaming=true"),
        ({"source": "a", "shuffle_buffer": 0, "streaming": True}, ConfigError, "shuffle_buffer=0: .*at least 1"),
        (
            {"source": "a", "split": "train[:9]", "streaming": True},
            ConfigError,
            r"split=train\[:9\]: a stream has no length",
        ),
        ({"source": "org/missing"}, DataError, r"org/missing \(train\): .*org/missing"),
    ],
)
def test_errors(settings, error, message):
    with pytest.raises(error, match=message):
        rows_of(**settings)


def test_empty_csv(tmp_path):
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(DataError, match=r"empty.csv: the file is empty"):
        rows_of(str(tmp_path / "empty.csv"))


def test_a_folder_without_fitting_files(tmp_path):
    with pytest.raises(DataError, match="no json file in this folder"):
        rows_of("json", data_dir=str(tmp_path))


MAGIC = ["exp[1]", "run*", "data [v1]", "why?", "[[]", "é #%20"]


@pytest.mark.parametrize("name", MAGIC)
@pytest.mark.parametrize("kind", ["csv", "csv.gz", "parquet", "txt", "jsonl"])
def test_a_path_is_that_path(tmp_path, monkeypatch, name, kind):
    monkeypatch.chdir(tmp_path)
    for folder, cell in ((name, "right"), ("exp1", "WRONG"), ("run2", "WRONG"), ("data v", "WRONG"), ("[", "WRONG")):
        (tmp_path / folder).mkdir(exist_ok=True)
        _write(tmp_path / folder / f"x.{kind}", [{"text": cell}])
    right = [{"text": "right"}]
    assert rows_of(f"{name}/x.{kind}") == right
    assert rows_of(str(tmp_path / name)) == right  # the folder
    if kind != "jsonl":
        assert [*open_rows(Source(f"{name}/x.{kind}", streaming=True))] == right
    word = {"jsonl": "json", "txt": "text"}.get(kind, kind.removesuffix(".gz"))
    assert rows_of(word, data_files=f"x.{kind}", data_dir=name) == right
    assert rows_of(word, data_files="x.*", data_dir=name) == right  # a pattern within that folder
    assert rows_of(word, data_dir=name) == right


def _write(path, rows):
    if path.suffix == ".parquet":
        return HFDataset.from_list(rows).to_parquet(path)
    text = {
        ".csv": lambda: "text\n" + "".join(f"{row['text']}\n" for row in rows),
        ".txt": lambda: "".join(f"{row['text']}\n" for row in rows),
        ".jsonl": lambda: "".join(json.dumps(row) + "\n" for row in rows),
    }[path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix]()
    data = text.encode("utf-8")
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return None


@pytest.mark.parametrize("folder", ["plain", "set [v2]*"])
def test_folders_laid_out_as_on_the_hub(tmp_path, folder):
    root = tmp_path / folder
    (root / "data").mkdir(parents=True)
    (root / "README.md").write_text("---\nlicense: mit\n---\nA set.\n")
    _write(root / "data" / "train-00000.jsonl", [{"text": "one", "n": [1]}])
    _write(root / "data" / "test-00000.jsonl", [{"text": "two", "n": "1"}])
    assert rows_of(str(root)) == [{"text": "one", "n": [1]}]
    assert rows_of(str(root), split="test") == [{"text": "two", "n": "1"}]
    assert rows_of(str(root), data_dir="data") == [{"text": "one", "n": [1]}]
    assert rows_of(str(root), data_files="data/test*") == [{"text": "two", "n": "1"}]
    with pytest.raises(
        DataError, match="unknown split 'val'; available: test, train|unknown split 'val'; available: train, test"
    ):
        rows_of(str(root), split="val")
    configs = "configs:\n- config_name: a\n  data_files: data/test-*\n- config_name: b\n  data_files: data/train-*\n"
    (root / "README.md").write_text(f"---\n{configs}---\n")
    assert rows_of(str(root), name="a") == [{"text": "two", "n": "1"}]
    assert rows_of(str(root), name="b") == [{"text": "one", "n": [1]}]
    with pytest.raises(ConfigError, match="name=c: not a configuration .*allowed: a, b"):
        rows_of(str(root), name="c")


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "txt", "jsonl"])
def test_a_byte_order_mark_is_harmless(tmp_path, kind):
    (tmp_path / "set").mkdir()
    path = tmp_path / "set" / f"x.{kind}"
    _write(path, [{"text": "a"}, {"text": "b"}])
    data = path.read_bytes()
    marked = b"\xef\xbb\xbf" + (gzip.decompress(data) if kind.endswith("gz") else data)
    path.write_bytes(gzip.compress(marked) if kind.endswith("gz") else marked)
    assert rows_of(str(path)) == rows_of(str(tmp_path / "set")) == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("kind", ["csv", "txt", "jsonl"])
def test_one_meaning_of_line(tmp_path, kind, end):
    # str.splitlines would break a line at each of these.
    texts = [f"a{mark}b" for mark in ("\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e")]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts] if kind == "jsonl" else texts
    head = f"text{end}" if kind == "csv" else ""
    (tmp_path / f"x.{kind}").write_bytes((head + end.join(lines) + end).encode("utf-8"))
    assert rows_of(str(tmp_path / f"x.{kind}")) == [{"text": text} for text in texts]
    if kind == "txt":
        assert read_lines(str(tmp_path / "x.txt")) == texts


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "set").mkdir()
    _write(tmp_path / "set" / "x.jsonl", [{"text": "a"}])
    for where in (
        {"source": "~/set/x.jsonl"},
        {"source": "~/set"},
        {"source": "json", "data_files": "~/set/x.jsonl"},
        {"source": "json", "data_files": "~/set/*.jsonl"},
        {"source": "json", "data_dir": "~/set"},
        {"source": "~/set", "data_files": "~/set/x.jsonl"},
    ):
        assert rows_of(**where) == [{"text": "a"}], where


@pytest.mark.parametrize("value", ["[" * 100_000, "1" * 5000])
def test_json_that_python_cannot_hold_is_named(tmp_path, value):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"a": ' + value + "\n")
    with pytest.raises(DataError, match=r"x.jsonl, line 2: (JSON that cannot be read|invalid JSON)"):
        rows_of(str(tmp_path / "x.jsonl"))
    (tmp_path / "x.json").write_text("[" + value)
    with pytest.raises(DataError, match=r"x.json"):
        rows_of(str(tmp_path / "x.json"))
