"""A repository into a folder: whole, resumed, verified, and in one line when it cannot be."""

import errno
import hashlib
import os
import shutil
import traceback
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from hub_server import COMMIT, Hub
from huggingface_hub.utils import WeakFileLock

from kdtune.download import Download, download_repository
from kdtune.download.fetch import RemoteFile, file_digest
from kdtune.errors import CheckpointError
from kdtune.log import get_logger

SECRET = "hf_verysecrettoken123"
WEIGHTS = "model.safetensors"


def get(hub: Hub, folder: Path, **options: Any) -> Download:
    return download_repository("o/m", folder, endpoint=hub.url, **options)


def error_of(hub: Hub, folder: Path, repo: str = "o/m", **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        download_repository(repo, folder, endpoint=hub.url, **options)
    assert "\n" not in str(caught.value)
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    return str(caught.value)


def part_of(hub: Hub, folder: Path, name: str = WEIGHTS) -> Path:
    return folder / ".kdtune-download" / f"{hub.digest(name)}.part"


def held(folder: Path) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if not name.startswith(".kdtune-download/")}


def test_every_file_arrives(hub: Hub, tmp_path: Path) -> None:
    result = get(hub, tmp_path / "m", ignore_patterns=[])
    assert held(tmp_path / "m") == hub.files
    assert result.files == {name: len(body) for name, body in hub.files.items()}
    assert set(result.fetched) == set(hub.files)
    assert result.source == f"o/m at main ({COMMIT[:12]})"


def test_duplicate_weights_are_left_out_by_default(hub: Hub, tmp_path: Path) -> None:
    result = get(hub, tmp_path / "m")
    assert set(result.left_out) == {"pytorch_model.bin", "original/consolidated.00.pth"}
    assert set(held(tmp_path / "m")) == set(hub.files) - set(result.left_out)


def test_weights_stay_when_there_are_no_safetensors(hub: Hub, tmp_path: Path) -> None:
    del hub.files[WEIGHTS]
    get(hub, tmp_path / "m")
    assert set(held(tmp_path / "m")) == set(hub.files)


def test_given_patterns_replace_the_default_ones(hub: Hub, tmp_path: Path) -> None:
    get(hub, tmp_path / "m", ignore_patterns=["original/consolidated.00.pth"])
    assert set(held(tmp_path / "m")) == set(hub.files) - {"original/consolidated.00.pth"}


def test_patterns_that_leave_nothing_are_an_error(hub: Hub, tmp_path: Path) -> None:
    assert "leave out all 7 files" in error_of(hub, tmp_path / "m", ignore_patterns=["*"])


def test_a_second_run_fetches_nothing(hub: Hub, tmp_path: Path) -> None:
    get(hub, tmp_path / "m")
    hub.requests.clear()
    result = get(hub, tmp_path / "m")
    assert result.fetched == ()
    assert not [request for request in hub.requests if "/resolve/" in request.path]


def test_files_that_came_another_way_are_hashed_not_fetched(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / WEIGHTS).write_bytes(hub.files[WEIGHTS])
    result = get(hub, tmp_path)
    assert WEIGHTS not in result.fetched
    assert hub.bodies(WEIGHTS) == []


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_damaged_file_is_fetched_again(
    hub: Hub, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    get(hub, tmp_path)
    path, body = tmp_path / WEIGHTS, hub.files[WEIGHTS]
    if damage == "delete":
        path.unlink()
    else:
        path.write_bytes(body[:-1] + bytes([body[-1] ^ 1]) if damage == "flip" else body[:100])
    monkeypatch.setattr(get_logger(), "propagate", True)
    assert get(hub, tmp_path).fetched == (WEIGHTS,)
    assert path.read_bytes() == body
    assert ("not what the repository holds" in caplog.text) == (damage != "delete")


def test_another_revision_replaces_what_changed(hub: Hub, tmp_path: Path) -> None:
    get(hub, tmp_path)
    hub.files["config.json"] = b'{"model_type": "qwen2"}\n'
    assert get(hub, tmp_path).fetched == ("config.json",)
    assert (tmp_path / "config.json").read_bytes() == hub.files["config.json"]


def test_a_cut_body_goes_on_where_it_broke(hub: Hub, tmp_path: Path) -> None:
    hub.cuts[WEIGHTS] = [100_000, 150_000]
    get(hub, tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == hub.files[WEIGHTS]
    assert [request.headers.get("range") for request in hub.bodies(WEIGHTS)] == [
        None,
        "bytes=100000-",
        "bytes=250000-",
    ]
    assert hub.sent(WEIGHTS) == len(hub.files[WEIGHTS])


def test_a_server_without_ranges_sends_it_whole(hub: Hub, tmp_path: Path) -> None:
    hub.ranges, hub.cuts[WEIGHTS] = False, [100_000]
    get(hub, tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == hub.files[WEIGHTS]


def test_busy_answers_are_tried_again(hub: Hub, tmp_path: Path) -> None:
    hub.statuses[WEIGHTS] = [503, 429, 500]
    get(hub, tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == hub.files[WEIGHTS]


def test_a_connection_that_never_holds_ends_in_an_error_and_keeps_the_part(hub: Hub, tmp_path: Path) -> None:
    hub.cuts[WEIGHTS] = [200_000] + [0] * 20
    assert "cannot be reached" in error_of(hub, tmp_path)
    assert part_of(hub, tmp_path).read_bytes() == hub.files[WEIGHTS][:200_000]
    hub.cuts.clear()
    hub.requests.clear()
    get(hub, tmp_path)
    assert hub.sent(WEIGHTS) == len(hub.files[WEIGHTS]) - 200_000
    assert (tmp_path / WEIGHTS).read_bytes() == hub.files[WEIGHTS]


@pytest.mark.parametrize("part", [b"of an older revision" * 1000, b"x" * 400_000, b"longer" * 100_000])
def test_a_part_with_other_content_is_thrown_away(hub: Hub, tmp_path: Path, part: bytes) -> None:
    part_of(hub, tmp_path).parent.mkdir()
    part_of(hub, tmp_path).write_bytes(part)
    part_of(hub, tmp_path).with_name(f"{'0' * 40}.part").write_bytes(b"of another revision")
    get(hub, tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == hub.files[WEIGHTS]
    assert not list(tmp_path.rglob("*.part"))


def test_corruption_on_the_way_is_found_and_mended(hub: Hub, tmp_path: Path) -> None:
    hub.corrupt = {WEIGHTS: 1, "config.json": 1}
    get(hub, tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == hub.files[WEIGHTS]
    assert (tmp_path / "config.json").read_bytes() == hub.files["config.json"]


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_lasting_corruption_is_an_error_and_leaves_no_file(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.corrupt = {name: 99}
    message = error_of(hub, tmp_path)
    assert message.startswith(f"{name}: hash mismatch") and hub.digest(name) in message
    assert not (tmp_path / name).exists() and not part_of(hub, tmp_path, name).exists()


def test_git_blob_hashes(tmp_path: Path) -> None:
    # The ids that git itself gives these contents.
    (tmp_path / "hello").write_bytes(b"hello\n")
    (tmp_path / "empty").write_bytes(b"")
    hello, empty = "ce013625030ba8dba906f756967f9e9ca394464a", "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    assert file_digest(tmp_path / "hello", RemoteFile("hello", 6, hello)) == hello
    assert file_digest(tmp_path / "empty", RemoteFile("empty", 0, empty)) == empty
    sha256 = hashlib.sha256(b"hello\n").hexdigest()
    assert file_digest(tmp_path / "hello", RemoteFile("hello", 6, sha256)) == sha256


def test_gated_says_what_to_do(hub: Hub, tmp_path: Path) -> None:
    hub.gated, hub.needs_token = True, SECRET
    message = error_of(hub, tmp_path)
    assert f"accept its licence at {hub.url}/o/m" in message and "--hf-token" in message
    get(hub, tmp_path, token=f" {SECRET}\n")
    assert (tmp_path / WEIGHTS).exists()


def test_gated_with_a_token_of_another_account(hub: Hub, tmp_path: Path) -> None:
    hub.gated = True
    message = error_of(hub, tmp_path, token=SECRET)
    assert "the token has no access" in message and f"{hub.url}/o/m" in message


def test_a_token_that_is_not_accepted(hub: Hub, tmp_path: Path) -> None:
    hub.needs_token = "hf_right"
    message = error_of(hub, tmp_path, token=SECRET)
    assert "does not accept the token" in message and "settings/tokens" in message


@pytest.mark.parametrize("token", ["", "  ", f"{SECRET}\nx: y", f"{SECRET} {SECRET}", f"{SECRET}é"])
def test_a_token_that_cannot_be_sent_is_refused_unseen(hub: Hub, tmp_path: Path, token: str) -> None:
    assert "no token has" in error_of(hub, tmp_path, token=token)
    assert hub.requests == []


def test_the_token_of_the_environment_is_sent(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", SECRET)
    get(hub, tmp_path)
    assert {request.headers["authorization"] for request in hub.requests} == {f"Bearer {SECRET}"}


def test_the_token_does_not_follow_a_redirect_to_another_host(hub: Hub, other_host: Hub, tmp_path: Path) -> None:
    hub.redirect_to = other_host.url
    other_host.cuts[WEIGHTS] = [100_000]
    get(hub, tmp_path, token=SECRET)
    assert (tmp_path / WEIGHTS).read_bytes() == hub.files[WEIGHTS]
    assert all(request.headers["authorization"] == f"Bearer {SECRET}" for request in hub.requests)
    assert other_host.bodies(WEIGHTS)[1].headers["range"] == "bytes=100000-"
    assert not [request for request in other_host.requests if SECRET in str(request.headers)]


def test_no_such_repository(hub: Hub, tmp_path: Path) -> None:
    message = error_of(hub, tmp_path, "o/missing")
    assert message.startswith("o/missing: no such repository") and "private" in message


def test_no_such_revision(hub: Hub, tmp_path: Path) -> None:
    assert "no such revision: 'v9'" in error_of(hub, tmp_path, revision="v9")


def test_no_repository_name(hub: Hub, tmp_path: Path) -> None:
    assert "want OWNER/NAME" in error_of(hub, tmp_path, "one/two/three")


def test_an_unreachable_server_is_named(hub: Hub, tmp_path: Path) -> None:
    message = error_of(Hub({}, url="http://user:pass@127.0.0.1:9"), tmp_path)
    assert message.startswith("http://127.0.0.1:9: cannot be reached")


def test_the_endpoint_of_the_environment(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url + "/")
    download_repository("o/m", tmp_path)
    assert (tmp_path / WEIGHTS).exists()


def test_offline_mode_is_named(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in error_of(hub, tmp_path)


def test_a_folder_of_another_model_is_not_mixed_up(hub: Hub, tmp_path: Path) -> None:
    get(hub, tmp_path)
    assert f"{tmp_path}: holds o/m, not o/other" in error_of(hub, tmp_path, "o/other")


def test_an_unreadable_record_only_costs_hashing(hub: Hub, tmp_path: Path) -> None:
    get(hub, tmp_path)
    (tmp_path / ".kdtune-download/record.json").write_text("{")
    assert get(hub, tmp_path).fetched == ()


@pytest.mark.parametrize("name", ["../escape.json", "/etc/escape.json", "a/../../escape.json", "..\\escape.json"])
def test_file_names_that_lead_out_are_refused(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.files = {name: b"{}"}
    assert "refused file name" in error_of(hub, tmp_path / "in")
    assert not list(tmp_path.rglob("escape.json"))


def test_too_little_space_is_said_before_the_first_byte(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1000))
    message = error_of(hub, tmp_path)
    assert "not enough space: 400.1 kB to download, 1.0 kB free" in message
    assert not [request for request in hub.requests if "/resolve/" in request.path]


def test_a_disk_that_fills_up(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert f"{tmp_path}: cannot be written: No space left on device" in error_of(hub, tmp_path)


def test_a_folder_that_cannot_be_made(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "cannot be written" in error_of(hub, tmp_path / "file" / "m")


def test_a_folder_in_use(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / ".kdtune-download").mkdir()
    with WeakFileLock(tmp_path / ".kdtune-download/lock"):
        assert "another download is writing there" in error_of(hub, tmp_path)
