"""A hub that sends what no hub should: one message each, nothing endless, nothing raw on the terminal, no token given away."""

import time
from email.utils import formatdate
from pathlib import Path

import pytest
from exit_codes import run_command
from hub_server import Hub
from test_download_hub import SECRET, WEIGHTS, error_of, get, held

from kdtune.log import get_logger

FILE = {"type": "file", "path": "a.json", "size": 3, "oid": "0" * 40}


@pytest.mark.parametrize("held_before", [0, 1000])
def test_no_more_than_the_announced_size_is_read(hub: Hub, tmp_path: Path, held_before: int) -> None:
    hub.files, hub.endless, hub.ranges = {WEIGHTS: b"x" * 9000}, True, False
    part = tmp_path / ".kdtune-download" / f"{hub.digest(WEIGHTS)}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * held_before)
    message = error_of(hub, tmp_path)
    assert message.startswith(f"{WEIGHTS}: the server sends more than the 9000 bytes that the repository announces")
    assert hub.sent(WEIGHTS) < 20_000_000  # what fits into the sockets' buffers; 800 MB if nobody hangs up
    assert held(tmp_path) == {} and not list(tmp_path.rglob("*.part"))


def test_a_file_named_like_another_ones_part(hub: Hub, tmp_path: Path) -> None:
    hub.files = {
        "a.json.part": b"part",
        "a.json": b"{}",
        "b/a.json.part": b"{",
        "b/a.json": b"{}",
        "record.json.part": b"",
    }
    get(hub, tmp_path)
    assert held(tmp_path) == hub.files
    hub.requests.clear()
    assert get(hub, tmp_path).fetched == ()


@pytest.mark.parametrize(
    "name", ["a\0b", "a\x1b[31mb\n.txt", "a\rb", "a\x85b", "a\u2028b", "a\u202eb", "a\tb", "\ud83d"]
)
def test_names_with_control_characters(
    hub: Hub, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    hub.entries = [{**FILE, "path": name}]
    assert run_command(["download", "o/m", "--output-dir", str(tmp_path / "m")]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: refused file name {name!r}: it holds control characters")
    assert name not in err and err.count("\n") == 1 and not (tmp_path / "m").exists()
    # One that is left out does no harm, and is told so that the terminal stays as it is.
    hub.files = {"ok.txt": b"1"}
    hub.entries += [{"type": "file", "path": "ok.txt", "size": 1, "oid": hub.digest("ok.txt")}]
    assert run_command(["download", "o/m", "--output-dir", str(tmp_path / "m"), "--ignore-patterns", "[!o]*"]) == 0
    assert f"left out: {name!r}" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    "answer",
    [
        b'{"a":[[[', b"", b"<html>sign in</html>", b"null", b"17", b'"text"', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000,
        b"[" * 900 + b"]" * 900, b'{"sha": 5}', b'{"sha": "\\u001b[2J"}', b"9" * 5000,
    ],
)  # fmt: skip
def test_answers_that_are_no_hubs(hub: Hub, tmp_path: Path, answer: bytes) -> None:
    hub.answer = answer
    message = error_of(hub, tmp_path / "m")
    assert message.startswith("/api/models/o/m: what the server answers is not what a hub answers (")
    assert "check HF_ENDPOINT" in message and len(message) < 400 and not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    "entry",
    [
        None, "a.json", [], {}, {"type": "file"}, {**FILE, "path": 5}, {**FILE, "path": None}, {**FILE, "size": "3"},
        {**FILE, "size": -1}, {**FILE, "size": True}, {**FILE, "size": 1.5}, {**FILE, "size": None}, {**FILE, "oid": "../../x"},
        {**FILE, "oid": None}, {**FILE, "oid": "0" * 39}, {**FILE, "lfs": "text"}, {**FILE, "lfs": {"oid": "0" * 40}},
    ],
)  # fmt: skip
def test_entries_that_are_no_files(hub: Hub, tmp_path: Path, entry: object) -> None:
    hub.entries = [entry]
    assert "is not what a hub answers (found " in error_of(hub, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_an_endless_answer(hub: Hub, tmp_path: Path) -> None:
    hub.answer, hub.endless = b"[1, 2, 3,", True
    assert "more than 33554432 bytes" in error_of(hub, tmp_path / "m")
    assert hub.requests[-1].sent < 100_000_000


def test_a_list_that_goes_on_for_ever(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdtune.download.listing._MOST_PAGES", 7)
    hub.entries, hub.next_page = [], "?cursor=again"
    assert "goes on after 7 pages" in error_of(hub, tmp_path / "m")


@pytest.mark.parametrize(
    "page", ["http://127.0.0.3:1/api", "file:///etc/passwd", "https://127.0.0.1/api", "//evil.example/x"]
)
def test_the_next_page_is_at_the_same_server(hub: Hub, tmp_path: Path, page: str) -> None:
    hub.next_page = page
    assert "its next page is at another server" in error_of(hub, tmp_path / "m", token=SECRET)


def test_a_list_of_several_pages(hub: Hub, tmp_path: Path) -> None:
    hub.page_size = 3
    get(hub, tmp_path, ignore_patterns=[])
    assert held(tmp_path) == hub.files
    assert len([request for request in hub.requests if "/tree/" in request.path]) == 3


@pytest.mark.parametrize("place", ["ftp://127.0.0.1", "file://", "javascript:alert", "http://[", "http://\x7f"])
def test_redirects_to_elsewhere(hub: Hub, tmp_path: Path, place: str) -> None:
    hub.redirect_to = place
    start = time.monotonic()
    assert "cannot be reached" in error_of(hub, tmp_path)
    assert held(tmp_path) == {} and time.monotonic() - start < 5


def test_redirects_in_a_circle(hub: Hub, tmp_path: Path) -> None:
    hub.redirect_to = hub.url
    assert "cannot be reached" in error_of(hub, tmp_path)
    assert len(hub.requests) < 50


@pytest.mark.parametrize("path", ["api", WEIGHTS])
@pytest.mark.parametrize("form", ["seconds", "date"])
def test_a_busy_server_says_how_long_to_wait(
    hub: Hub, tmp_path: Path, path: str, form: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("kdtune.download.fetch.time.sleep", slept.append)
    monkeypatch.setattr(get_logger(), "propagate", True)
    hub.statuses[path] = [429, 503]
    hub.retry_after = "40" if form == "seconds" else formatdate(time.time() + 40, usegmt=True)
    get(hub, tmp_path)
    assert [38 < seconds <= 40 for seconds in slept if seconds > 1] == [True, True]
    assert "the server answers HTTP 429 and asks to wait" in caplog.text


@pytest.mark.parametrize("asked", ["301", "999999999", "Fri, 31 Dec 2100 23:59:59 GMT"])
def test_a_server_that_wants_too_long_a_wait(hub: Hub, tmp_path: Path, asked: str) -> None:
    hub.statuses[WEIGHTS], hub.retry_after = [429], asked
    message = error_of(hub, tmp_path)
    assert "HTTP 429 and wants to be asked again in " in message and "what has been downloaded is kept" in message
    assert "config.json" in held(tmp_path)


@pytest.mark.parametrize("asked", ["soon", "-5", "", "1e9", "9" * 5000, "Fri, 31 Dec 1999 23:59:59 GMT"])
def test_a_wait_that_means_nothing(hub: Hub, tmp_path: Path, asked: str) -> None:
    hub.statuses[WEIGHTS], hub.retry_after = [503], asked
    get(hub, tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == hub.files[WEIGHTS]


@pytest.mark.parametrize("names", [["a", "a/b"], ["x/y/z", "x"], ["twice", "twice"]])
def test_names_that_are_in_each_others_way(hub: Hub, tmp_path: Path, names: list[str]) -> None:
    hub.entries = [{**FILE, "path": name} for name in names]
    message = error_of(hub, tmp_path / "m")
    assert all(repr(name) in message for name in names) and "--ignore-patterns" in message


def test_names_that_differ_by_case_alone(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.files = {"README.md": b"1", "readme.md": b"2"}
    monkeypatch.setattr("kdtune.download.hub.is_case_blind", lambda folder: True)
    assert "'readme.md' and 'README.md' are one file" in error_of(hub, tmp_path / "m")
    monkeypatch.setattr("kdtune.download.hub.is_case_blind", lambda folder: False)
    get(hub, tmp_path / "m")
    assert held(tmp_path / "m") == hub.files


@pytest.mark.parametrize("name", ["x" * 300, "/".join(["d"] * 3000)])
def test_names_that_the_file_system_does_not_have(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.entries = [{**FILE, "path": name}]
    assert "cannot be written: File name too long" in error_of(hub, tmp_path / "m")


@pytest.mark.parametrize("endpoint", ["foo", "ftp://x", "http://", "http://[", "http://x:99999999", "http://a\x1bb"])
def test_an_endpoint_that_is_no_address(hub: Hub, tmp_path: Path, endpoint: str) -> None:
    hub.url = endpoint
    assert "is no address of a hub" in error_of(hub, tmp_path / "m")


@pytest.mark.parametrize("drips_lists", [False, True])
def test_a_server_that_drips_is_given_up_and_what_came_is_kept(
    hub: Hub, tmp_path: Path, drips_lists: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdtune.download.fetch._STALL_S", 0.15)
    hub.page_bytes, hub.seconds_per_page, hub.drips_lists = 50, 0.01, drips_lists
    hub.files = {WEIGHTS: hub.files[WEIGHTS]}
    start = time.monotonic()
    message = error_of(hub, tmp_path)
    assert time.monotonic() - start < 10  # a minute and more at that pace
    assert "it sends too slowly: " in message and " bytes in 0.15 s); check the network" in message
    kept = sum(path.stat().st_size for path in tmp_path.rglob("*.part"))
    assert kept == 0 if drips_lists else 0 < kept < 5 * 16_384
    hub.page_bytes, hub.seconds_per_page, hub.drips_lists = 1 << 14, 0.0, False
    hub.requests.clear()
    get(hub, tmp_path)
    assert held(tmp_path) == hub.files
    assert hub.sent(WEIGHTS) == len(hub.files[WEIGHTS]) - kept


def test_a_slow_server_that_goes_on_is_waited_for(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdtune.download.fetch._STALL_S", 0.2)
    hub.seconds_per_page = 0.03
    get(hub, tmp_path)
    assert held(tmp_path)[WEIGHTS] == hub.files[WEIGHTS]
    assert len(hub.bodies(WEIGHTS)) == 1


def test_an_answer_of_a_few_bytes_each_time_is_given_up(hub: Hub, tmp_path: Path) -> None:
    hub.cuts[WEIGHTS] = [10] * 1000
    error_of(hub, tmp_path)
    assert len(hub.bodies(WEIGHTS)) == 5
