"""The report: complete, self-contained, safe, and sound in a real browser."""

import base64
import json
import os
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from run_fixture import HAS_SPECTRA, write_run

from galdist.report import plots
from galdist.report.report import ReportConfig, _multipole_panels, report
from galdist.run import RunError
from galdist.statistics.metrics import load_metrics, metric_row, save_metrics
from hpc import durable

HOSTILE = '<script>alert(1)</script> & "quotes" $\\frac{'


def _report(run: Path, **config: Any) -> str:
    steps = [path for path in run.iterdir() if path.is_dir() and path.name != "report"]
    report(ReportConfig(**config), {"steps": steps}, run / "report")
    return (run / "report" / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("runs") / "tiny", description=HOSTILE)
    save_metrics(
        folder / "classifier", [metric_row(f"m {HOSTILE}", f"s {HOSTILE}", 1.5, 0.25, f"u {HOSTILE}")]
    )
    record = durable.read_json(folder / "grids-a" / "provenance.json")
    record |= {"host": HOSTILE, "versions": {HOSTILE: HOSTILE}, "git_commit": HOSTILE}
    durable.write_json(folder / "grids-a" / "provenance.json", record)
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return _report(run, title=f"title {HOSTILE}")


class _Elements(HTMLParser):
    """Start tags of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data + " "

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def test_text_is_escaped(page: str) -> None:
    elements = _Elements(page)
    assert elements.of("script") == []
    for text in ("title ", "m ", "s ", "u "):
        assert text + HOSTILE in elements.text
    assert elements.text.count(HOSTILE) >= 8


def test_page_is_self_contained(page: str, run: Path) -> None:
    elements = _Elements(page)
    for image in elements.of("img"):
        assert str(image["src"]).startswith("data:image/svg+xml;base64,")
        assert str(image["alt"]).strip()
    for source in elements.of("source"):
        assert str(source["srcset"]).startswith("data:image/svg+xml;base64,")
    assert [link["href"] for link in elements.of("link")] == ["data:,"]
    assert "url(" not in page.split("<style>")[1].split("</style>")[0]
    links = [str(link["href"]) for link in elements.of("a")]
    ids = {attrs["id"] for _, attrs in elements.tags if "id" in attrs}
    assert "../grids-a/dask-report.html" in links
    assert "../classifier/log.txt" in links
    for link in links:
        if link.startswith("#"):
            assert link[1:] in ids
        else:
            assert (run / "report" / link).is_file()


def test_sections_and_figures_of_everything_the_run_has(page: str, run: Path) -> None:
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    spectra = ["Spectra"] if HAS_SPECTRA else []
    tables = ["Results", "Resources", "Provenance"]
    assert headings == ["Summary", "Boxes", *spectra, "Halo occupation", "Training", *tables]
    names = {"slices-1", "slices-2", "occupation-hod", "training-classifier", "training-regressor"}
    if HAS_SPECTRA:
        names |= {"spectra-1", "spectra-2"}  # one for each suite
    figures = {path.name for path in (run / "report" / "figures").iterdir()}
    assert figures == {f"{name}.{suffix}" for name in names for suffix in ("pdf", "png")}


def test_figures_say_which_run_made_them(page: str, run: Path) -> None:
    fingerprint = durable.read_json(run / "classifier" / "provenance.json")["fingerprint"]
    assert f"Run tiny; classifier {fingerprint[:8]}." in page
    png = (run / "report" / "figures" / "training-classifier.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert f"Run tiny; classifier {fingerprint[:8]}." in png.decode("latin-1")
    assert (run / "report" / "figures" / "training-classifier.pdf").read_bytes().startswith(b"%PDF")


def test_numbers_are_those_that_the_steps_saved(page: str, run: Path) -> None:
    values = {row["metric"]: row["value"] for row in load_metrics(run / "r2unet")}
    text = re.sub("[ \n]+", " ", _Elements(page).text)
    positives = f"{int(values['true_positives']):,}".replace(",", "\u202f")
    assert f"has a galaxy {positives}" in text
    assert f"recall {100 * values['recall']:.2f}%" in text
    assert "11.520 ± 0.013 Msun/h" in text
    assert "1.50 ± 0.25" in text


def _table(page: str, caption: str) -> list[list[str]]:
    """Cells of a table's rows, without their marks."""
    body = re.split("<tbody>", page[page.index(f"<caption>{caption}") :])[1].split("</tbody>")[0]
    cells = (re.findall(r"<t[dh].*?>(.*?)</t[dh]>", row) for row in body.split("</tr>"))
    return [[re.sub(r"<.*?>", "", cell).strip() for cell in row] for row in cells if row]


def test_resources_asked_for_and_used(tmp_path: Path) -> None:
    page = _report(write_run(tmp_path / "tiny"))
    rows = {row[0]: row[1:] for row in _table(page, "Resources: asked for and used")}
    speed = "61.8 samples/s, 3% waiting for data, 81% waiting for the GPU"
    gpus = "4, 83% busy, 3.21 GB"
    used = ["1:00:00 of 2:00:00", "4.3 GB of 17 GB", "4 of 8"]
    assert rows["classifier"] == ["4711", "n1, n2", "4", *used, gpus, speed]
    assert rows["grids-a"] == ["4712", "n3", "1", "1:00", "828 MB", "0.5 of 1", "–", "–"]
    each = ["–", "–", "–", "58:20", "3.2 GB of 4.3 GB", "0.9 of 2", "–", "–"]
    assert rows["each of its 2 workers"] == each
    assert rows["hod"] == ["pid 99", "node01", "1", "0:20", "828 MB", "1.5", "–", "–"]
    assert rows["r2unet"] == ["–", "–", "1", "0:41", "828 MB", "–", "–", "–"]  # of an older galdist
    assert 'style="width: 25.0%"></span></span>4.3 GB of 17 GB' in page
    assert "Attempts that did not end well (1)" in page
    assert re.search(r"<td>2026-03-01 11:00:00 UTC</td><td>4700</td><td>rank 1: was killed</td>", page)
    assert "<dt>Seed of the run</dt><dd>11</dd>" in page


def test_multipoles_in_redshift_space_have_a_panel_each() -> None:
    k = np.linspace(0.3, 3, 10)
    poles = {
        label: {"monopole": amplitude / k, "quadrupole": 0.2 * amplitude / k, "shot_noise": 1.0}
        for label, amplitude in (("truth", 100.0), ("hod", 80.0))
    }
    panels = _multipole_panels([{"k": k, "nyquist": 4.0, "multipoles": poles}] * 2)
    drawn = []
    for panel in panels:
        _, (ax,) = plots.figure()
        panel.draw(ax, plots.Palette(["hod"], ["hod"]))
        drawn.append(ax)
    assert ["P_0" in ax.get_ylabel() for ax in drawn] == [True, False]
    assert ["P_2" in ax.get_ylabel() for ax in drawn] == [False, True]
    assert "Monopoles" in panels[0].alt


def test_a_run_without_results_has_a_page(tmp_path: Path) -> None:
    run = write_run(tmp_path / "tiny")
    written = yaml.safe_load((run / "run.yaml").read_text())
    del written["description"]  # as in a run file that has none
    (run / "run.yaml").write_text(yaml.safe_dump(written))
    for step in ("regressor", "r2unet", "hod", "spectra"):
        shutil.rmtree(run / step, ignore_errors=True)
    shutil.rmtree(run / "grids-a" / "grids.zarr")
    (run / "classifier" / "done.json").unlink()
    (run / "classifier" / "history.jsonl").write_text("")
    (run / "classifier" / "metrics.json").unlink()
    page = _report(run)
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Summary", "Resources", "Provenance"]
    assert "stopped" in page
    assert "<h1>tiny</h1>" in page


def test_without_predictions_the_test_boxes_are_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "tiny")
    for step in ("classifier", "regressor", "r2unet", "hod", "spectra"):
        shutil.rmtree(run / step, ignore_errors=True)
    page = _report(run, boxes=1, slab=3.0)
    assert _report(run, boxes=1, slab=3.0) == page  # the same results, the same page
    assert re.findall(r"<h3>(.*?)</h3>", page) == ["MockA_CV_1"]
    assert [image["alt"].split(" in the slab")[0] for image in _Elements(page).of("img")] == [
        "Map of matter (matter counts)",
        "Map of truth (galaxy counts)",
    ]
    assert "z = 10.9 to 14.1 Mpc/h" in page  # 4 of 32 planes of 25 Mpc/h


def test_outside_a_run_there_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run here"):
        report(ReportConfig(), {"steps": []}, tmp_path / "report")


# In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    from selenium.webdriver.chrome.service import Service

    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(
            "no Chromium here: install chromium and chromium-driver to test reports in a browser"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (
        "--headless",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
        *(["--no-sandbox"] if os.geteuid() == 0 else []),
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=Service(driver))
    started.get("about:blank")  # leaves Chromium's own first page
    yield started
    started.quit()


def _open(browser: Any, run: Path, width: int, scheme: str) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600},
    )
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    browser.get((run / "report" / "report.html").as_uri())


def _requests(browser: Any) -> list[str]:
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 375])
def test_page_in_a_browser(browser: Any, run: Path, page: str, width: int, scheme: str) -> None:
    browser.get_log("performance")
    _open(browser, run, width, scheme)
    assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == []
    requests = _requests(browser)
    assert any(url.startswith("file:") for url in requests)
    assert [url[:80] for url in requests if not url.startswith(("file:", "data:"))] == []
    images = browser.execute_script(
        "return [...document.images].map(i => [i.complete && i.naturalWidth > 0, i.alt, i.currentSrc])"
    )
    assert len(images) == page.count("<img ")
    assert all(loaded and alt for loaded, alt, _ in images)
    drawings = [base64.b64decode(source.split(",", 1)[1]).decode() for _, _, source in images]
    assert all(("#ececec" in svg) == (scheme == "dark") for svg in drawings)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    shade = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (np.mean([int(value) for value in re.findall(r"\d+", shade)[:3]]) < 128) == (scheme == "dark")


def test_page_prints(browser: Any, run: Path, page: str) -> None:
    _open(browser, run, 1280, "dark")
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    pdf = base64.b64decode(printed["data"])
    assert pdf.startswith(b"%PDF")
    pages = len(re.findall(rb"/Type\s*/Page\b", pdf))
    assert 2 <= pages <= 20
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    sources = browser.execute_script("return [...document.images].map(i => i.currentSrc)")
    assert not any("#ececec" in base64.b64decode(source.split(",", 1)[1]).decode() for source in sources)
