"""The report's sections on galaxies in halos: figures, tables, LaTeX, published figures beside our own."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import yaml
from matplotlib.path import Path as Outline
from numpy.typing import NDArray
from run_fixture import HAS_SPECTRA
from small_tables import make_tables

from galdist.catalogs.centrals import read_centrals
from galdist.catalogs.samples import create_samples
from galdist.report import halo_plots, plots, tables
from galdist.report.halos import _TracerBox
from galdist.report.published import PUBLISHED
from galdist.report.report import ReportConfig, report
from galdist.report.tables import Cell, Row, Table
from galdist.run import RunError
from galdist.statistics.scores import ScoresConfig, load_scores, scores
from galdist.statistics.tracer_spectra import load_tracers
from hpc import durable

N = 2600
TARGETS = ("log_stellar_mass", "color_gi")
PAIR = "+".join(TARGETS)
LABELS = {"sqr": "SQR joint", "best-1": "Flow", "best-2": "Flow", "far": "100% & far_off", "mass": "Mass"}
"""Step -> label; Flow has two seeds, Mass draws stellar masses alone."""


def _galaxies() -> dict[str, NDArray[Any]]:
    """Columns with galaxies of all tracers, clustered."""
    random = np.random.default_rng(3)
    mass = random.uniform(8.8, 11.2, N)
    color = np.where(random.random(N) < 0.3, random.normal(1.1, 0.05, N), random.normal(0.7, 0.15, N))
    centers = random.uniform(0, 25, (150, 3))
    position = (centers[random.integers(0, 150, N)] + random.normal(0, 0.6, (N, 3))) % 25
    return {
        "log_halo_mass": mass + 2,
        "spin": np.zeros(N),
        "log_stellar_mass": mass.astype("f4"),
        "color_gi": color.astype("f4"),
        "position": position.astype("f4"),
        "split": np.repeat(np.array([2, 1, 0], "i1"), [2000, 400, 200]),
    }


def _predict(
    step: Path, centrals: Path, label: str, noise: float, targets: tuple[str, ...], seed: int
) -> None:
    truth = read_centrals([centrals], TARGETS, "test")
    random = np.random.default_rng(seed)
    values = np.stack([truth.columns[name] for name in targets], axis=1)
    draws = values[:, None] + noise * random.normal(size=(len(values), 9, len(targets)))
    attrs = truth.simulations[0]
    store = create_samples(
        step / "samples.zarr", [(attrs, len(values))], targets, 9, label, "mock", [f"{step.name}"]
    )
    for start in store.starts(attrs.name):
        part = slice(start, start + store.chunk)
        extrapolated = truth.columns["log_stellar_mass"][part] > 10.8
        store.write(attrs.name, start, truth.row[part], values[part], draws[part], extrapolated)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose scores, and tracers where nbodykit is there, the real stages measured."""
    folder = tmp_path_factory.mktemp("runs") / "halos"
    centrals = make_tables(folder / "centrals", (N,), **_galaxies())
    predictions = []
    for seed, (name, label) in enumerate(LABELS.items()):
        noise = 0.5 if name == "far" else 0.05 if name == "sqr" else 0.01
        targets = TARGETS[:1] if name == "mass" else TARGETS
        _predict(folder / name, centrals, label, noise, targets, seed)
        predictions.append(folder / name)
    (folder / "scores").mkdir()
    config = ScoresConfig(bootstrap=4, floor_draws=4)
    scores(config, {"catalogs": [centrals], "predictions": predictions}, folder / "scores")
    measured = ["scores"]
    if HAS_SPECTRA:
        _tracers(folder, [path.name for path in predictions])
        measured.append("tracers")
    inputs = {"catalogs": ["centrals"], "predictions": list(LABELS)}
    steps = [
        {"name": "centrals", "stage": "centrals", "config": {}},
        *(
            {"name": name, "stage": "sample", "config": {}, "inputs": {"catalogs": ["centrals"]}}
            for name in LABELS
        ),
        *({"name": name, "stage": name, "config": {}, "inputs": inputs} for name in measured),
        {"name": "report", "stage": "report", "config": {}, "inputs": {"steps": measured}},
    ]
    durable.write_text(folder / "run.yaml", yaml.safe_dump({"name": "halos", "seed": 1, "steps": steps}))
    durable.write_json(folder / ".plan.json", {str(step["name"]): f"{step['name']}0123456" for step in steps})
    return folder


def _tracers(folder: Path, predictions: list[str]) -> None:
    """The real stage, in a process of its own: importing nbodykit changes Dask's scheduler."""
    code = (
        "import sys; from pathlib import Path\n"
        "from galdist.statistics.tracer_spectra import TracersConfig, tracers\n"
        "run, *predictions = map(Path, sys.argv[1:])\n"
        "config = TracersConfig(draws=2, n_mesh=16, k_max=1.5, band=(0.3, 1.2), jackknife=2)\n"
        "inputs = {'catalogs': [run / 'centrals'], 'predictions': [run / p for p in predictions]}\n"
        "tracers(config, inputs, run / 'tracers')"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(folder), *predictions],
        check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def _report(run: Path, out: str = "report", **config: Any) -> str:
    steps = [path for path in run.iterdir() if (path / "scores.json").exists() or path.name == "tracers"]
    report(ReportConfig(**config), {"steps": steps}, run / out)
    return (run / out / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return _report(run, published="tng300")


def _cells(page: str, title: str) -> list[list[str]]:
    """Cells of the table in the page's region ``title``."""
    table = page[page.index(f'aria-label="{title}"') :].split("</table>")[0]
    rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    return [
        [re.sub(r"<.*?>", "", cell).strip() for cell in re.findall(r"<t[dh].*?>(.*?)</t[dh]>", row)]
        for row in rows
    ]


def test_sections_figures_and_tables_of_all_that_was_found(page: str, run: Path) -> None:
    found = ["Tracers"] if HAS_SPECTRA else []
    headings = ["Summary", "Distributions", *found, "Resources", "Provenance"]
    assert re.findall(r"<h2>(.*?)</h2>", page) == headings
    figures = {"marginals", "joint", "calibration", "points", "points-others"}
    names = {"best", "best-others", "ks", "distances", "wasserstein", "between-draws", "proper-scores"}
    names |= {"pinball", "range", "coverage", "ranks", "points-1", "points-2", "points-3"}
    if HAS_SPECTRA:
        kinds = ("residuals", "correlation", "cross", "confusion")
        figures |= {"tracers", *(f"tracer-{name}" for name in kinds)}
        kinds = ("counts", "chi2-band", "chi2-expected-band", "chi2-all", "relative")
        kinds += ("stochasticity", "kept", "between")
        names |= {f"tracer-{name}" for name in kinds}
    drawn = {path.name for path in (run / "report" / "figures").iterdir()}
    assert drawn == {f"{name}.{suffix}" for name in figures for suffix in ("pdf", "png")}
    assert {path.name for path in (run / "report" / "tables").iterdir()} == {f"{n}.tex" for n in names}
    for link in re.findall(r'href="((?:tables|figures)/.*?)"', page):
        assert (run / "report" / link).is_file()


def test_scores_stand_beside_published_ones_and_the_noise_floor(page: str, run: Path) -> None:
    rows = {(r["label"], r["metric"], r["of"]): r for r in load_scores(run / "scores")["rows"]}
    groups, heads, *lines, floor, between = _cells(page, "Kolmogorov–Smirnov distances")
    assert groups == ["", "log₁₀ M∗", "g–i", "log₁₀ M∗ and g–i, flat", "log₁₀ M∗ and g–i, mean"]
    assert heads == ["Model", "ours", "ours", "published", "ours", "published", "ours"]
    table = {line[0]: line[1:] for line in lines}
    assert table["SQR joint"][2] == "0.00511"
    assert table["SQR joint"][4] == "0.0095"
    assert table["Flow"][2] == ""
    for label in ("SQR joint", "Flow"):
        ours = float(table[label][3].split(" ± ")[0])
        assert ours == pytest.approx(rows[label, "ks_flat", PAIR]["value"], abs=1e-3)
    assert table["Mass"][1:] == [""] * 5
    assert floor[0] == "Noise floor"
    assert float(floor[4].split(" ± ")[0]) == pytest.approx(rows["Flow", "ks_flat", PAIR]["floor"], abs=1e-3)
    assert between[0] == "Between draws, Flow"
    self_floor = rows["Flow", "ks_flat", PAIR]["self_floor"]
    assert float(between[4].split(" ± ")[0]) == pytest.approx(self_floor, abs=1e-3)


def test_only_what_is_at_the_noise_floor_stands_out(page: str) -> None:
    table = page[page.index('aria-label="Kolmogorov') :].split("</table>")[0]
    lines = {line.split("</th>")[0]: line for line in table.split('<tr><th scope="row">')[1:]}
    assert lines["Flow"].count("<strong>") == 4
    assert "<strong>" not in lines["100% &amp; far_off"]


def test_published_errors_stand_beside_those_of_draws(page: str, run: Path) -> None:
    title = "Errors of single values: log₁₀ M∗ and g–i"
    lines = [line for line in _cells(page, title) if line[0] == "SQR joint"]
    assert [line[1] for line in lines] == ["published", "ours, draws", "ours, best values"]
    assert lines[0][2:] == ["0.0474", "0.1655", "0.2178", "0.4709", "0.1324", "27.56", ""]
    rows = {(r["label"], r["metric"], r["of"]): r["value"] for r in load_scores(run / "scores")["rows"]}
    assert float(lines[1][2].split(" ± ")[0]) == pytest.approx(rows["SQR joint", "mse_draw", PAIR], abs=1e-3)
    caption = page[page.index(f'aria-label="{title}"') :].split("</caption>")[0]
    assert "are of random draws" in caption


def test_every_metric_is_in_a_table(page: str, run: Path) -> None:
    """Each by its value, as the page writes it."""
    text = re.sub(r"<.*?>", " ", page)
    seen = set()
    for row in load_scores(run / "scores")["rows"]:
        if row["label"] == "Flow":
            seen.add(row["metric"])
            shown = tables.measured(row["value"], row["error"])
            assert shown in text, (row["metric"], row["of"])
    assert {"pinball_0.05", "pit_ks", "rank_chi2", "wasserstein", "ks_fasano_franceschini"} <= seen
    assert {"coverage_0.9", "pearson", "pearson_draw", "mape", "mad"} <= seen


def test_the_best_model_of_each_metric_and_who_is_as_good(page: str, run: Path) -> None:
    heads, *lines = _cells(page, "Best models: log₁₀ M∗ and g–i")
    assert heads == ["Score", "best", "value", "noise floor", "as good", "next", "worse by"]
    table = {line[0]: dict(zip(heads, line, strict=True)) for line in lines}
    assert "KS" not in table  # of one property
    found = {(one["metric"], one["of"]): one for one in load_scores(run / "scores")["comparisons"]}
    one = found["energy_score", PAIR]
    line = table["energy score"]
    assert line["best"] == one["best"] == "Flow"
    assert line["as good"] == ""
    assert line["next"] == "SQR joint"
    difference, error = one["worse"]["SQR joint"]
    assert difference > 2 * error
    assert line["worse by"] == tables.measured(difference, error)
    difference, error = found["ks_mean", PAIR]["worse"]["SQR joint"]
    assert ("SQR joint" in table["KS, mean"]["as good"]) == (difference < 2 * error)
    assert table["MSE, best values"]["as good"] == "Flow, 100% &amp; far_off"  # all are right
    assert table["MSE, best values"]["next"] == ""
    others = _cells(page, "Best models of other properties")
    assert {line[0] for line in others[1:]} == {"log₁₀ M∗", "g–i"}
    assert ["log₁₀ M∗", "CRPS", "Flow"] in [line[:3] for line in others]


def test_scores_inside_and_outside_of_the_training_range(page: str, run: Path) -> None:
    groups, heads, *lines = _cells(page, "Inside and outside the training range")
    assert groups == ["", "", "CRPS", "energy score", "coverage"]
    properties = ["log₁₀ M∗ [dex]", "g–i [mag]", "log₁₀ M∗ and g–i", "log₁₀ M∗", "g–i"]
    assert heads == ["Range", "halos", *properties]
    assert [line[0] for line in lines] == ["inside"] * 4 + ["outside"] * 4
    found = {(r["group"], r["label"], r["metric"], r["of"]): r for r in load_scores(run / "scores")["groups"]}
    table = {(line[0], line[1]): line[2:] for line in lines}
    for group in ("inside", "outside"):
        for column, (metric, of) in enumerate(
            [("crps", TARGETS[0]), ("crps", TARGETS[1]), ("energy_score", PAIR), ("coverage_0.9", TARGETS[0])]
        ):
            row = found[group, "Flow", metric, of]
            numbers = table[group, "Flow"]
            assert numbers[0] == str(row["n_rows"])
            assert numbers[1 + column] == tables.measured(row["value"], row["error"])
        assert table[group, "Mass"][2:4] == ["", ""]
    assert 'aria-label="Scores of each simulation"' not in page  # there is one


def test_without_published_figures_there_is_no_word_of_them(run: Path) -> None:
    page = _report(run, "again", models=["Flow"])
    assert "ublished" not in page
    assert PUBLISHED["tng300"].citation.split(",")[0] not in page
    assert "Flow" in page[page.index("<picture>") : page.index("</picture>")]


def test_figures_show_the_best_and_the_published_ones(page: str) -> None:
    legends = re.findall(r'alt="Legend: (.*?)\."', page)
    assert legends[0] == "truth, Flow, SQR joint, 100% &amp; far_off, Mass"


def test_models_of_one_property_have_no_joint_density(run: Path) -> None:
    page = _report(run, "alone", models=["Mass"])
    assert "Joint density" not in page
    assert "Single values: log₁₀ M∗ of each model" in page


def test_a_tracer_that_the_truth_has_not_is_in_no_figure() -> None:
    entries = {"1": {"truth": {"n": 9}}, "2": {"truth": {"n": 8}}, "5": {"truth": {"n": 0}}}
    pairs = {"1x2": {"r_mean": 0.9}, "1x5": {"r_mean": 0.1}, "2x5": {"r_mean": None}}
    box = {"labels": {"Flow": []}, "tracers": entries, "cross": {"Flow": pairs}}
    view = _TracerBox(Mock(shown=["Flow"]), Mock(), "box", box, (0.1, 0.4))
    np.testing.assert_array_equal(view._matrix("Flow"), [[np.nan, np.nan], [0.9, np.nan]])


def test_models_that_are_not_there_are_named(run: Path) -> None:
    with pytest.raises(RunError, match=r"no label 'Flaw'; the run has SQR joint, Flow"):
        _report(run, "again", models=["Flaw"])
    with pytest.raises(ValueError, match=r"nothing is known of 'tng'; there is .*tng300"):
        ReportConfig(published="tng")


@pytest.mark.skipif(not HAS_SPECTRA, reason="nbodykit is not installed")
def test_tables_of_tracers_hold_what_was_measured(page: str, run: Path) -> None:
    box = load_tracers(run / "tracers")["simulations"]["box_0"]
    table = {line[0]: line[1:] for line in _cells(page, "Galaxies of each tracer")}
    assert table["truth"] == [f"{n:.0f}" for n in box["counts"]["truth"]]
    assert table["published truth"][1:3] == ["1497", "1942"]
    for key, title in (("chi2_band", "χ²"), ("chi2_expected_band", "χ² of the expected power")):
        rows = {line[0]: line[1:] for line in _cells(page, f"{title} over the 3 bins of 0.3 to 1.2 h/Mpc")}
        assert set(rows) == {"Model", "SQR joint", "Flow", "100% &amp; far_off", "Between draws, Flow"}
        for i, number in enumerate(box["tracers"]):
            found = box["tracers"][number]["labels"]["Flow"][key]
            assert float(rows["Flow"][i].split(" ± ")[0]) == pytest.approx(found["value"], rel=0.05, abs=1e-3)
            assert float(rows["Between draws, Flow"][i]) == pytest.approx(found["self_floor"], abs=0.051)
        seeds = [box["tracers"][number]["labels"]["Flow"][key]["seeds"] for number in box["tracers"]]
        total = np.mean(np.sum(seeds, axis=0))
        assert float(rows["Flow"][-1].split(" ± ")[0]) == pytest.approx(total, rel=0.05, abs=1e-3)


def test_published_sqr_stands_beside_the_model_of_balanced_rows() -> None:
    tng = PUBLISHED["tng300"]
    of_joint = {key[1:]: value for key, value in tng.scores.items() if key[0] == "SQR joint"}
    assert of_joint == {key[1:]: value for key, value in tng.scores.items() if key[0] == "SQR joint SMOGN"}
    for remark in ("ks", "point"):
        assert "balanced with SMOGN" in tng.remarks[remark]


# Tables


TABLE = Table(
    "some",
    "Some",
    "50% of χ² & more_",
    ("Model", "a", "b"),
    (Row("x_1", (Cell("0.10 ± 0.02", strong=True), Cell())), Row("y", (Cell("-1.5e-05"), Cell("no $")))),
    (Row("floor", (Cell("3"), Cell())),),
    (("both", 2),),
)


def test_latex_tables_are_whole_and_escaped(tmp_path: Path) -> None:
    tables.save_latex(TABLE, tmp_path)
    text = (tmp_path / "tables" / "some.tex").read_text()
    assert r"\caption{50\% of $\chi$$^2$ \& more\_}" in text
    assert r" & \multicolumn{2}{c}{both} \\" in text
    assert r"x\_1 & {\boldmath$0.10 \pm 0.02$} &  \\" in text
    assert r"y & $-1.5\times 10^{-5}$ & no \$ \\" in text
    body = text.split(r"\begin{tabular}{lrr}")[1].split(r"\end{tabular}")[0]
    counts = {line.count("&") for line in body.splitlines() if line.endswith(r"\\") and "multi" not in line}
    assert counts == {2}
    assert text.count(r"\begin{") == text.count(r"\end{")
    for rule in ("toprule", "bottomrule"):
        assert text.count(rule) == 1
    assert text.count("midrule") - text.count("cmidrule") == 2


def test_heads_of_rows_are_no_options_of_the_line_before(tmp_path: Path) -> None:
    rows = tuple(Row(head, (Cell("1"),)) for head in ("[OIII]", "*", "a [x]"))
    tables.save_latex(Table("some", "Some", "", ("Model", "a"), rows), tmp_path)
    text = (tmp_path / "tables" / "some.tex").read_text()
    assert [line for line in text.splitlines() if "$1$" in line] == [
        r"{}[OIII] & $1$ \\",
        r"{}* & $1$ \\",
        r"a [x] & $1$ \\",
    ]


def test_every_saved_table_is_sound(page: str, run: Path) -> None:
    """What LaTeX would stumble on, where there is no LaTeX to try."""
    del page
    files = sorted((run / "report" / "tables").glob("*.tex"))
    assert len(files) > 10
    for file in files:
        text = file.read_text()
        width = len(re.findall(r"\\begin\{tabular\}\{([lr]+)\}", text)[0])
        for line in (line for line in text.splitlines() if line.endswith(r"\\")):
            spans = sum(int(n) - 1 for n in re.findall(r"multicolumn\{(\d+)\}", line))
            assert len(re.findall(r"(?<!\\)&", line)) + 1 + spans == width, file.name
        bare = re.sub(r"\\(label|input)\{.*?\}|\\[&%$#_{}\\]", "", text)
        assert not re.search("[%#]", bare), file.name
        assert bare.count("{") == bare.count("}"), file.name
        for depth in itertools.accumulate({"{": 1, "}": -1}.get(letter, 0) for letter in bare):
            assert depth >= 0, file.name
        outside, mathematical = bare.split("$")[::2], bare.split("$")[1::2]
        assert len(outside) == len(mathematical) + 1, file.name
        assert not any("_" in part or "^" in part for part in outside), file.name
        for name in ("table", r"table\*", "tabular"):
            begun, ended = (len(re.findall(rf"\\{word}\{{{name}\}}", text)) for word in ("begin", "end"))
            assert begun == ended, file.name


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_takes_every_saved_table(page: str, run: Path, tmp_path: Path) -> None:
    del page
    files = sorted((run / "report" / "tables").glob("*.tex"))
    packages = "".join(rf"\usepackage{{{name}}}" for name in ("booktabs", "graphicx"))
    inputs = "\n".join(rf"\input{{{file.as_posix()}}}\clearpage" for file in files)
    document = rf"\documentclass{{article}}{packages}\begin{{document}}{inputs}\end{{document}}"
    (tmp_path / "all.tex").write_text(document)
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "all.tex"],
        cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    assert f"({len(files)} pages" in done.stdout


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.1234, 0.0567, "0.123 ± 0.057"),
        (0.0754794, 1.8e-6, "0.075479 ± 0.000002"),
        (0.5, 1e-12, "0.50000 ± 0.00001"),
        (40640.2, None, "40640"),
        (0.12345, None, "0.1235"),
        (0.7, None, "0.7000"),
        (0.7, 0.02, "0.700 ± 0.020"),
        (0.0031, 0.00012, "0.00310 ± 0.00012"),
        (1.684e-5, 1.9e-6, "1.68e-05 ± 0.19e-05"),
        (float("nan"), 0.1, ""),
    ],
)
def test_numbers_have_the_digits_that_mean_something(value: float, error: float | None, text: str) -> None:
    assert tables.measured(value, error) == text


def test_powers_of_ten_in_latex() -> None:
    assert tables._cell(Cell("1.68e-05 ± 0.19e-05")) == r"$1.68\times 10^{-5} \pm 0.19\times 10^{-5}$"


# Figures

PALETTE = plots.Palette(models=["a", "b", "c", "d", "e"])


def test_contours_hold_the_fractions_they_say() -> None:
    random = np.random.default_rng(0)
    x, y = random.normal(size=(2, 200_000))
    with plots.style():
        _, (ax,) = plots.figure()
        halo_plots.plot_joint(ax, (x, y), (x, y), PALETTE, "a", ("x", "y"))
    # Of a Gaussian 39.3, 67.5 and 95.0% lie within 1, 1.5 and 2.45 sigma.
    paths = [path for path in ax.collections[-1].get_paths() if len(path.vertices)]
    radii = sorted(np.median(np.hypot(*path.vertices.T)) for path in paths)
    np.testing.assert_allclose(radii, [0.994, 1.510, 2.448], rtol=0.03)


def test_few_galaxies_are_dots_around_contours_without_islands() -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 300))
    with plots.style():
        _, (ax,) = plots.figure()
        halo_plots.plot_joint(ax, (x, y), (x, y), PALETTE, "a", ("x", "y"))
    assert [len(line.get_xdata()) for line in ax.lines] == [300, 300]
    paths = [path for path in ax.collections[-1].get_paths() if len(path.vertices)]
    assert len(paths) == 2  # 39 and 68%
    for path in paths:
        assert np.count_nonzero(path.codes == Outline.MOVETO) == 1


def test_contours_close_where_the_truth_ends() -> None:
    x, y = np.random.default_rng(0).uniform(size=(2, 5000))
    with plots.style():
        _, (ax,) = plots.figure()
        halo_plots.plot_joint(ax, (x, y), (x + 0.2, y), PALETTE, "a", ("x", "y"))
    for path in ax.collections[-1].get_paths():
        assert not len(path.vertices) or np.count_nonzero(path.codes == Outline.CLOSEPOLY)


def test_draws_far_from_the_truth_have_no_contours() -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 1000))
    with plots.style():
        _, (ax,) = plots.figure()
        halo_plots.plot_joint(ax, (x, y), (x + 90, y), PALETTE, "a", ("x", "y"))
    assert len(ax.collections) == 3  # the truth's


def test_numbers_of_a_matrix_lose_only_leading_zeros() -> None:
    with plots.style():
        _, (ax,) = plots.figure()
        halo_plots.plot_matrix(ax, [[10.25, -0.31], [0.5, -0.001]], "ab", "x", "difference", ("x", "y"))
    assert [text.get_text() for text in ax.texts] == ["10.25", "−.31", ".50", ".00"]


def test_coverage_of_a_calibrated_model_is_nominal_and_of_a_narrow_one_below() -> None:
    with plots.style():
        _, (ax,) = plots.figure()
        narrow = np.full(51, 10.0)
        narrow[[0, -1]] = 200
        halo_plots.plot_coverage(ax, {"a": np.full(51, 100.0), "b": narrow}, 5100, PALETTE, "x")
    _, flat, below = (line.get_ydata() for line in ax.lines)
    np.testing.assert_allclose(flat, 0, atol=1e-9)
    assert below[0] == pytest.approx(100 * (490 / 890 - 49 / 51))


@pytest.mark.parametrize("plot", [halo_plots.plot_ranks, halo_plots.plot_coverage])
def test_frames_hold_what_is_badly_calibrated(plot: Any) -> None:
    narrow = np.ones(51)
    narrow[[0, -1]] = 2000
    with plots.style():
        _, (ax,) = plots.figure()
        plot(ax, {"a": np.full(51, 80.0), "b": narrow}, 4049, PALETTE, "x")
    low, high = ax.get_ylim()
    drawn = [line.get_ydata() for line in ax.lines]
    drawn += [patch.get_data().values for patch in ax.patches if hasattr(patch, "get_data")]
    assert low < min(np.min(values) for values in drawn)
    assert high > max(np.max(values) for values in drawn)
    assert max(abs(low), high) > 5


def test_rank_histograms_have_unit_mean_whatever_the_number_of_draws() -> None:
    with plots.style():
        _, (ax,) = plots.figure()
        halo_plots.plot_ranks(ax, {"a": np.arange(1, 52), "b": np.full(21, 7)}, 1000, PALETTE, "x")
    for stairs in ax.patches[:2]:
        values, edges, _ = stairs.get_data()
        assert np.sum(values * np.diff(edges)) == pytest.approx(1)


def test_marginals_are_densities_and_their_ratio_to_the_truth() -> None:
    random = np.random.default_rng(0)
    truth, model = random.normal(size=20_000), random.normal(0.1, 1, 30_000)
    with plots.style():
        _, (ax,) = plots.figure(panel=halo_plots.TALL)
        halo_plots.plot_marginal(ax, truth, {"a": model}, PALETTE, halo_plots.property_of("x"))
    density, edges, _ = ax.patches[1].get_data()
    assert np.sum(density * np.diff(edges)) == pytest.approx(1, abs=2e-3)
    found, _, _ = ax.patches[2].get_data()
    band, ratio = (patch.get_data().values for patch in ax.child_axes[0].patches)
    good = np.isfinite(ratio)
    np.testing.assert_allclose(ratio[good], found[good] / density[good])
    assert good.sum() > 20
    np.testing.assert_array_equal(np.isfinite(band), good)  # to the end of the last bin


def test_frames_of_marginals_hold_models_that_peak_higher_and_elsewhere() -> None:
    random = np.random.default_rng(0)
    truth, model = random.normal(size=20_000), random.normal(4.5, 0.2, 20_000)
    with plots.style():
        _, (ax,) = plots.figure(panel=halo_plots.TALL)
        halo_plots.plot_marginal(ax, truth, {"a": model}, PALETTE, halo_plots.property_of("log_ssfr"))
    assert ax.get_ylim()[1] > ax.patches[2].get_data().values.max() > 1.5
    assert ax.get_xlim()[1] > np.quantile(model, 0.998)
    assert ax.get_ylabel() == "probability density [dex$^{-1}$]"
    assert halo_plots.beyond(truth, {"a": model, "far": model + 90}) == {
        "a": pytest.approx(0, abs=2e-3),
        "far": 1,
    }


def test_properties_are_written_in_symbols() -> None:
    assert halo_plots.property_of("log_metallicity").name == "log₁₀ Z∗"
    assert halo_plots.property_of("log_v_max")[:2] == ("log₁₀ v max", r"$\log_{10}$ v max")
    assert halo_plots.property_of("spin").unit == ""
    assert tables.escape("log₁₀ M∗ [dex]") == r"$\log_{10}$ $M_\star$ [dex]"


def test_legends_of_many_panels_are_whole_and_fit_a_phone() -> None:
    names = ["Chain", "Random forest", "SQR", "Chain, halo mass alone", "NN_class joint"]
    palette = plots.Palette(models=names)
    size = plots.key_size(palette, names)
    assert size[0] < 4.5
    with plots.style():
        figure, (ax,) = plots.figure(panel=size)
        plots.plot_key(ax, palette, names)
        figure.draw_without_rendering()
        box = ax.get_legend().get_window_extent()
        assert figure.bbox.x0 < box.x0 < box.x1 < figure.bbox.x1
        assert figure.bbox.y0 < box.y0 < box.y1 < figure.bbox.y1


def test_the_signature_of_a_figure_is_as_wide_as_the_figure() -> None:
    with plots.style():
        figure, _ = plots.figure()
        plots.sign(figure, "draws-of-some-model-seed1 01234567, " * 12)
        figure.draw_without_rendering()
        assert figure._supxlabel.get_window_extent().x1 < figure.bbox.x1


def test_power_that_is_not_positive_is_left_out_and_the_ratio_is_relative() -> None:
    k = np.linspace(0.05, 1, 20)
    power = 1000 / k
    power[5] = -3.0
    curve = plots.Curve(power, 0.1 * np.abs(power))
    with plots.style():
        figure, (ax,) = plots.figure(panel=halo_plots.TALL)
        halo_plots.plot_tracer_power(ax, k, curve, {"a": 1.1 * power}, PALETTE, (0.1, 0.4), "x")
        figure.draw_without_rendering()
    below = ax.child_axes[0]
    ratio = below.lines[1].get_ydata()
    assert np.isnan(ratio[5])
    np.testing.assert_allclose(np.delete(ratio, 5), 0.1)
    assert ax.get_yscale() == "log"
    assert ax.get_xlim() == below.get_xlim()


def test_panels_below_others_are_within_the_figure() -> None:
    values = np.random.default_rng(0).normal(size=1000)
    with plots.style():
        figure, (ax,) = plots.figure(panel=halo_plots.TALL)
        halo_plots.plot_marginal(ax, values, {"a": values}, PALETTE, halo_plots.property_of("$x_y$"))
        plots.settle(figure)
        figure.draw_without_rendering()
    label = ax.child_axes[0].xaxis.label.get_window_extent()
    assert label.y0 > 0
    assert label.y0 < 0.08 * figure.bbox.y1


def test_models_look_the_same_everywhere_and_differ() -> None:
    looks = [PALETTE[label] for label in "abcde"]
    assert len({look.color for look in looks}) == len({str(look.line) for look in looks}) == 5
    assert plots.INK not in {look.color for look in looks}
    assert PALETTE["truth"].color == plots.INK
    assert plots.Palette(models=["a:b"])["a:b"].name == "a:b"
