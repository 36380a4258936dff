"""The page of a timeline holds its data safely, and a browser shows and searches it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eventtrain import Callback, Trainer
from eventtrain.callbacks import EventTimeline, GradientAccumulation, GradientClipping
from eventtrain.callbacks.profiling.timeline import json_in_html
from tests.callbacks.profiling.timelines import (
    BATCHES,
    MS,
    STEP_OF_TWO_BATCHES,
    Clock,
    Document,
    Listens,
    Model,
    embedded,
    fit,
    trainer_of,
)
from tests.kit import local


@given(st.text(alphabet=st.characters() | st.sampled_from("<>&'\"/\\!-\u2028\u2029\ud800"), max_size=20))
def test_data_in_the_page_stays_data(name: str) -> None:
    text = json_in_html({name: [name]})
    assert json.loads(text) == {name: [name]}
    assert not set(text) & set("<>&") and text.isascii()


def test_the_page_refers_to_no_other_file(tmp_path: Path, clock: Clock) -> None:
    fit(tmp_path, clock)
    page = (tmp_path / "timelines" / "timeline-0.html").read_text(encoding="utf-8")
    document = Document(page)
    assert not [(tag, attributes) for tag, attributes in document.elements if attributes.keys() & {"src", "href", "srcset"}]
    assert not re.search(r"https?:|url\(|@import|fetch\(|XMLHttpRequest|WebSocket|import\(", page)
    (policy,) = [a["content"] for tag, a in document.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and "default-src 'none'" in policy


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

Browse = Callable[..., Document]


@pytest.fixture(scope="module")
def browse(tmp_path_factory: pytest.TempPathFactory) -> Browse:
    """Return a function that opens a page in a headless browser, runs a script in it, and returns the page afterwards."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser to open the page in: none of {', '.join(BROWSERS)} is on the PATH")

    def opened(page: Path, script: str = "", edit: Callable[[str], str] = str) -> Document:
        text = edit(page.read_text(encoding="utf-8"))
        copy = page.with_suffix(".opened.html")
        copy.write_text(text.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
        for _ in range(3):  # a browser that starts for the first time may give up on a page before its script has run
            profile = tmp_path_factory.mktemp("profile")
            done = subprocess.run(
                [
                    *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
                    *(
                        "--disable-background-networking",
                        "--disable-component-update",
                        "--disable-sync",
                        "--disable-dev-shm-usage",
                    ),
                    *(f"--user-data-dir={profile}", "--window-size=1200,900", "--virtual-time-budget=2000", "--dump-dom"),
                    copy.as_uri(),
                ],
                capture_output=True,
                text=True,
                encoding="utf-8",
                timeout=120,
            )
            assert done.returncode == 0 and "</html>" in done.stdout, done.stderr
            if 'class="bar ' in done.stdout:
                break
        return Document(done.stdout)

    return opened


def bars(document: Document) -> list[dict[str, Any]]:
    """Return the bars of the chart: their records, and their places in pixels."""
    places = []
    for tag, attributes in document.elements:
        if tag == "div" and (attributes.get("class") or "").startswith("bar "):
            style = dict(part.strip().split(": ") for part in (attributes["style"] or "").split(";") if part.strip())
            place = {name: float(style[name].removesuffix("px")) for name in ("left", "width", "top")}
            places.append({"index": int(attributes["data-index"] or ""), "class": attributes["class"], **place})
    return places


def table(document: Document) -> list[tuple[dict[str, str | None], list[str]]]:
    return [(attributes, cells) for attributes, cells in document.rows if "data-index" in attributes]


def body(document: Document) -> dict[str, str | None]:
    return next(attributes for tag, attributes in document.elements if tag == "body")


def chart(document: Document) -> tuple[int, int]:
    """Return the range of the chart, in nanoseconds."""
    (shown,) = [attributes for _, attributes in document.elements if attributes.get("id") == "chart"]
    return int(shown["data-from"] or ""), int(shown["data-to"] or "")


# A browser takes a second or two to open a page. These tests share the page of STEP_OF_TWO_BATCHES.


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    clock = Clock()
    timeline = fit(tmp_path_factory.mktemp("run"), clock, GradientAccumulation(2), GradientClipping(1.0), Listens(clock))
    return local(timeline.write()[0])


@pytest.fixture(scope="module")
def opened(page: Path, browse: Browse) -> Document:
    return browse(page)


def test_a_browser_lists_the_records_in_order_and_nested(opened: Document) -> None:
    expected: list[list[str]] = []
    for line in STEP_OF_TWO_BATCHES.splitlines():
        depth, text = str((len(line) - len(line.lstrip())) // 2), line.strip()
        name, _, took = text.lstrip(".> ").rpartition(" ")
        if text.startswith("> "):
            expected[-1][-1] += name + shown(took)
        else:
            expected.append([depth, name, shown(took), ""])
    rows = [[attributes["data-depth"], cells[3], cells[1], cells[4]] for attributes, cells in table(opened)]
    assert rows == expected
    assert opened.title == "Event timeline"


def shown(us: str) -> str:
    """Return a duration as the page shows it, with three digits."""
    value = float(us)
    if value == 0:
        return "0"
    return f"{value:#.3g} µs".replace(". ", " ") if value < 1000 else f"{value / 1000:#.3g} ms"


def test_a_browser_draws_the_bars_in_their_places(page: Path, opened: Document) -> None:
    data = embedded(page.parent.parent)["records"]
    drawn = {bar["index"]: bar for bar in bars(opened)}
    scale = drawn[0]["width"] / (16.047 * MS)  # the epoch fills the width
    assert drawn[0]["left"] == 0 and drawn[0]["width"] > 1000
    lasting = [index for index, record in enumerate(data) if record[5] - record[4] >= MS]
    assert [data[index][1] for index in lasting] == [
        *("epoch 0", "batch 2", "forward", "backward", "batch 3", "optimizer step", "forward", "backward")
    ]
    for index in lasting:
        _, _, _, depth, start, end, *_ = data[index]
        bar = drawn[index]
        assert bar["left"] == pytest.approx(start * scale, abs=1.5)
        assert bar["width"] == pytest.approx((end - start) * scale, abs=2.5)
        assert bar["top"] - drawn[0]["top"] == 22 * depth
    for index, bar in drawn.items():
        assert bar["width"] >= 2  # a record without a duration is visible too
        assert data[index][0] in bar["class"].split()
    assert [attributes["title"] for _, attributes in opened.elements if attributes.get("class") == "window"] == [
        "global_step 1: 16.0 ms"
    ]


LOOK_EVERYWHERE = """
const texts = [];
for (const record of records) {
  fill(record);
  choose(record, "keys");
  texts.push($("tip").textContent);
}
document.body.dataset.texts = JSON.stringify(texts);
"""

COUNT_REQUESTS = """
setTimeout(() => { document.body.dataset.requests = performance.getEntriesByType("resource").length; }, 500);
"""


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """Serve on this machine; yield the address, and the list of paths that are requested."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{serving.server_port}", asked
        finally:
            serving.shutdown()
            thread.join()


def test_names_are_shown_as_text_and_nothing_is_fetched(
    tmp_path: Path, clock: Clock, browse: Browse, server: tuple[str, list[str]]
) -> None:
    address, asked = server
    by_image = "<img src=x onerror=\"document.title='broken'\">"
    by_script = "</script><script>document.title='broken'</script>"
    by_request = f"--><b id=bold>&amp;\u2028'\"<img src={address}/pixel><link rel=stylesheet href={address}/style>"
    hostile = [by_image, by_script, by_request]

    def handler(self: Any, trainer: Trainer, event: Any) -> None:
        if trainer.global_step == 2:
            raise RuntimeError(by_image)

    class Vetoes(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, event: Any) -> None:
            if trainer.batch_idx == 1:
                event.skip(by_image)

    listeners = [type(name, (Callback,), {"on_before_backward": handler})() for name in hostile]
    module = type(by_script, (Model,), {})(clock)
    timeline = EventTimeline(steps={1, 2}, clock=clock)
    with pytest.raises(RuntimeError, match="img"):
        trainer_of(tmp_path, timeline, Vetoes(), *listeners).fit(module, BATCHES)
    document = browse(timeline.write()[0], LOOK_EVERYWHERE + COUNT_REQUESTS)

    assert document.title == "Event timeline"
    assert [kind for kind, _ in document.scripts] == ["application/json", None, None]  # the data, the page's and the test's
    assert not [tag for tag, attributes in document.elements if tag in ("img", "link") or attributes.get("id") == "bold"]
    assert asked == []
    assert body(document)["data-requests"] == "0"

    cells = [cell for _, row in table(document) for cell in row]
    assert any(all(f"{name}.handler" in cell for name in hostile) for cell in cells)
    assert any("reason" in cell and by_image in cell for cell in cells)
    texts = json.loads(body(document)["data-texts"] or "")
    for name in hostile:
        assert any(text.startswith(f"{name}.handler") for text in texts)


def test_the_policy_of_the_page_forbids_requests(page: Path, browse: Browse, server: tuple[str, list[str]]) -> None:
    address, asked = server
    element = f"<header><img src={address}/pixel><link rel=stylesheet href={address}/style>"

    def with_element(text: str) -> str:
        return text.replace("<header>", element)

    def without_policy(text: str) -> str:
        return re.sub("<meta http-equiv[^>]*>", "", with_element(text))

    browse(page, edit=with_element)
    assert asked == []
    document = browse(page, COUNT_REQUESTS, without_policy)  # the counter of requests counts
    assert sorted(asked) == ["/pixel", "/style"]
    assert body(document)["data-requests"] == "2"


USE = """
const press = (on, key) => on.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true, cancelable: true}));
const selected = () => document.querySelector("tr[aria-selected]");
const visible = () => [...rows.children].filter((row) => !row.hidden).map((row) => row.querySelector(".name").textContent);
const bright = () => [...document.querySelectorAll(".bar:not(.dim)")].map((bar) => records[bar.dataset.index].name);
const results = {views: [], filtered: {}};

for (const keys of KEYS_PRESSED) {
  press(chart, "Escape");
  press(chart, "0");
  for (const key of keys) press(chart, key);
  draw();
  results.views.push([Number(chart.dataset.from), Number(chart.dataset.to)]);
}

press(chart, "Escape");
for (let i = 0; i < 5; i++) press(chart, "ArrowDown");
results.tip = $("tip").textContent;
results.chosen = selected().querySelector(".name").textContent;
press(selected(), "ArrowDown");
results.next = selected().querySelector(".name").textContent;
results.focused = document.activeElement === selected();
draw();
results.outlined = [...document.querySelectorAll(".bar.chosen")].map((bar) => records[bar.dataset.index].name);

for (const words of WORDS_SEARCHED) {
  $("search").value = words;
  $("search").dispatchEvent(new Event("input"));
  draw();
  results.filtered[words] = {rows: visible(), bars: [...new Set(bright())], none: !$("none").hidden};
}
press($("search"), "Escape");
results.cleared = visible().length;
$("heard").click();
results.heard = visible();
$("heard").click();
document.querySelector("[data-category=forward]").click();
results.without_forward = visible();
document.body.dataset.results = JSON.stringify(results);
"""


def test_the_page_is_used_by_keys_and_searched(page: Path, browse: Browse) -> None:
    whole = [0, 16_047_000]
    first_batch = [0, 8_661_600]  # 8.02 ms, and 4 % of it on either side
    views: list[tuple[list[str], list[int]]] = [
        ([], whole),
        (["+"], [3_209_400, 12_837_600]),
        (["+", "ArrowLeft"], [1_765_170, 11_393_370]),
        (["+", "ArrowRight", "-"], whole),
        (["+", "+", "+", "0"], whole),
        (["ArrowDown"] * 5 + ["Enter"], first_batch),
        (["ArrowDown"] * 6 + ["ArrowUp", "Enter"], first_batch),
    ]
    searches = {
        "LISTENS. back": ["before_backward", "before_backward"],  # by the listener
        "gradient_clip_val 1": ["clipping", "clipping_decided", "after_gradient_clipping"],  # by the payload
        "nothing like it": [],
    }
    script = USE.replace("KEYS_PRESSED", json.dumps([keys for keys, _ in views]))
    results = json.loads(body(browse(page, script.replace("WORDS_SEARCHED", json.dumps([*searches]))))["data-results"] or "")

    assert results["views"] == [view for _, view in views]
    assert results["tip"].startswith("batch 2loop8.02 ms · own time 0 · at 0batch_idx: 2")
    assert (results["chosen"], results["next"], results["outlined"]) == ("batch 2", "train_batch_start", ["train_batch_start"])
    assert results["focused"]

    assert {words: shown["rows"] for words, shown in results["filtered"].items()} == searches
    assert set(results["filtered"]["LISTENS. back"]["bars"]) == {"before_backward", "Listens.on_before_backward"}
    assert [shown["none"] for shown in results["filtered"].values()] == [False, False, True]
    everything = [line for line in STEP_OF_TWO_BATCHES.splitlines() if ">" not in line]
    assert results["cleared"] == len(everything)
    assert "train_batch_start" in results["heard"] and "after_forward" not in results["heard"]
    assert results["without_forward"] == [
        re.sub(r" *(\. )?(.*) \d+", r"\2", line) for line in everything if "forward" not in line
    ]


def test_pauses_notes_and_own_times_are_shown(tmp_path: Path, clock: Clock, browse: Browse) -> None:
    timeline = EventTimeline(steps={0, 3}, clock=clock, max_events=66)
    trainer_of(tmp_path, timeline, Listens(clock)).fit(Model(clock), BATCHES)
    document = browse(timeline.write()[0])
    titles = [a["title"] for _, a in document.elements if a.get("class") in ("pause", "window")]
    assert titles == ["16.1 ms not recorded", "global_step 0: 8.03 ms", "global_step 3: 8.03 ms"]
    assert [a for tag, a in document.elements if a.get("class") == "note"]
    (batch,) = [cells for _, cells in table(document) if cells[3] == "batch 0"]
    assert batch[1:3] == ["8.03 ms", "0"]
