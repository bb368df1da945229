"""The report's page in a headless Chromium: no console error, no request, and what a reader does with it."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kdtune.reports import token_page, write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on this machine")


class Browser:
    """A headless browser driven over its DevTools pipe: JSON messages, each ended by a zero byte."""

    def __init__(self, profile: Path) -> None:
        to_browser, from_browser = os.pipe(), os.pipe()

        def connect() -> None:
            # Both ends are moved out of the way first: one of them may be 3 or 4 itself.
            ends = [os.dup(to_browser[0]), os.dup(from_browser[1])]
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        assert BROWSER is not None
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run"]
        self._process = subprocess.Popen(
            [BROWSER, *options, f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=connect, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_browser[0])
        os.close(from_browser[1])
        self._out, self._in = os.fdopen(to_browser[1], "wb", buffering=0), os.fdopen(from_browser[0], "rb", buffering=0)
        self._rest, self._number, self.events = b"", 0, list[dict[str, Any]]()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    _session: str | None = None

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            chunk = self._in.read(65536)
            assert chunk, "the browser is gone"
            self._rest += chunk
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path) -> None:
        self.call("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())

    def value(self, expression: str) -> Any:
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def mouse(self, kind: str, x: float, y: float, clicks: int = 1) -> None:
        button = "none" if kind == "mouseMoved" else "left"
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, buttons=1, clickCount=clicks)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._out.close()
        self._in.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("page")
    cells = []
    for lr in (0.1, 0.01):
        for seed in (0, 1):
            run = folder / f"train-{lr}-{seed}"
            run.mkdir()
            rows = [
                {"step": k, "loss": lr + (seed + 2) / k, "kd_loss": 1 / k, "class_loss": 2 / k} for k in range(1, 101)
            ]
            (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            axes = {"lr": lr, "seed": seed}
            cells.append({"cell": f"lr={lr} seed={seed}", "axes": axes, "status": "done", "metrics": {"train.loss": lr + seed},
                          "seconds": {"train": 1.0}, "folders": {"train": run.name}})  # fmt: skip
    (folder / "results.jsonl").write_text("".join(json.dumps(cell) + "\n" for cell in cells))
    write_report(folder / "results.jsonl", folder / "report", title="Browser", baseline={"lr": 0.1})
    browser = Browser(folder / "profile")
    browser.open(folder / "report/report.html")
    yield browser
    browser.close()


def test_tables_and_curves_are_there(page: Browser) -> None:
    assert page.value("document.querySelectorAll('#summary tbody tr').length") == 2
    assert page.value("document.querySelectorAll('#cells tbody tr').length") == 4
    assert page.value("document.querySelectorAll('.panel').length") == 3
    assert page.value("document.querySelectorAll('path.curve').length") == 6
    box = page.value(
        "(({width, height}) => ({width, height}))(document.querySelector('path.curve').getBoundingClientRect())"
    )
    assert box["width"] > 100 and box["height"] > 50


def test_a_heading_sorts(page: Browser) -> None:
    first = "document.querySelector('#cells tbody td').textContent"
    page.value("document.querySelector('#cells th button').click()")
    assert page.value(first) == "0.01"
    page.value("document.querySelector('#cells th button').click()")
    assert page.value(first) == "0.1"
    assert page.value("document.querySelector('#cells th').getAttribute('aria-sort')") == "descending"


def test_the_legend_hides_a_row(page: Browser) -> None:
    for expected in (3, 6):
        page.value("document.querySelector('#legend button').click()")
        assert page.value("document.querySelectorAll('path.curve').length") == expected


def test_drag_zooms_and_double_click_resets(page: Browser) -> None:
    labels = "[...document.querySelectorAll('.panel')[0].querySelectorAll('text')].map((text) => text.textContent)"
    page.value("document.querySelector('.panel').scrollIntoView()")
    box = "document.querySelector('.panel svg').getBoundingClientRect()"
    left, top, width, height = (page.value(f"{box}.{side}") for side in ("left", "top", "width", "height"))
    whole = page.value(labels)
    assert "100" in whole
    y = top + height / 2
    page.mouse("mouseMoved", left + width / 2, y)
    assert page.value("document.querySelector('#tooltip').hidden") is False
    assert page.value("document.querySelector('#tooltip').textContent").startswith("step ")
    page.mouse("mousePressed", left + width * 0.3, y)
    page.mouse("mouseMoved", left + width * 0.5, y)
    page.mouse("mouseReleased", left + width * 0.5, y)
    assert "100" not in page.value(labels)
    for clicks in (1, 2):
        page.mouse("mousePressed", left + width / 2, y, clicks)
        page.mouse("mouseReleased", left + width / 2, y, clicks)
    assert page.value(labels) == whole


def test_a_token_is_chosen_on_the_page_of_examples(page: Browser, tmp_path: Path) -> None:
    """Text from the data stays text; a click shows both models' numbers, an arrow key goes on to the next token."""
    token = {"divergence": 0.25, "teacher_loss": 1.5, "student_loss": None, "teacher_entropy": 0.5, "student_entropy": 0.75,
             "teacher_top": [["</script><b>x", 0.75, 0.125]], "student_top": [["\n", 0.0002, 0.5]]}  # fmt: skip
    rows = [[{"text": "prompt"}, {"text": "</script><b>x", **token}, {"text": "\n", **token, "divergence": None}]]
    (tmp_path / "inspect.html").write_text(token_page("Examples", "JSD (0.5)", rows))
    page.events = [event for event in page.events if event.get("method") != "Page.loadEventFired"]
    page.open(tmp_path / "inspect.html")
    assert page.value("document.querySelector('.text').textContent") == "prompt</script><b>x⏎\n"
    assert page.value("document.querySelectorAll('b').length") == 0
    page.value("document.querySelector('.text button').click()")
    detail = page.value("document.querySelector('#detail').innerText")
    assert all(text in detail for text in ("JSD (0.5)", "0.250", "1.500", "infinite", "75.0 %", "0.0200 %"))
    page.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight")
    assert page.value("document.activeElement.textContent") == "⏎"
    page.value(
        "(by => { by.value = 'teacher_loss'; by.dispatchEvent(new Event('change')); })(document.querySelector('#by'))"
    )
    assert page.value("document.querySelector('#most').textContent") == "1.500"


def test_nothing_was_asked_for_or_complained_about(page: Browser) -> None:
    """Comes last: over all that the tests above did."""
    page.value("1")
    requests = [
        event["params"]["request"]["url"] for event in page.events if event.get("method") == "Network.requestWillBeSent"
    ]
    assert len(requests) >= 1 and all(url.startswith(("file:", "data:")) for url in requests), requests
    assert sum(url.startswith("file:") for url in requests) == 2  # the two pages
    complaints = [
        e
        for e in page.events
        if e.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    ]
    assert not complaints
