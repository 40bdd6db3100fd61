"""The report's section on statistics of fields shows what the step saved."""

import numpy as np
import pytest
import yaml

from galdist.report import field_plots, plots
from galdist.report.artist import Artist
from galdist.report.fields import chunks, field_blocks, response_tables
from galdist.report.plots import Curve, Palette
from galdist.run import Run, Step
from galdist.statistics.counts import EDGES
from galdist.statistics.fields import FILE
from galdist.statistics.spectra import FILE as SPECTRA
from galdist.statistics.spectra import plain
from hpc import durable

PALETTE = Palette(["draw0", "hod"], ["hod"])


def box(scale=1.0):
    """What `field-statistics` saves of a box, with plausible numbers."""
    k, side, radius = np.geomspace(0.3, 5, 6), np.array([0.4, 0.8, 1.6]), np.array([1.5, 2.0, 3.0])
    probability = np.zeros((3, EDGES.size - 1))
    probability[:, :4] = 0.9, 0.08, 0.015, 0.005
    fields = {}
    for label, factor in (("truth", 1.0), ("diffusion", 1.1), ("hod", 0.7)):
        fields[label] = {
            "mean": side,
            "variance": scale * factor / side + 1,
            "poisson": np.ones(3),
            "distribution": probability,
            "voids": factor * np.array([1e-2, 1e-3, 0]),
            "power": 1 / k,
        }
        for shape in ("equilateral", "squeezed"):
            values = scale * factor / k**2
            if shape == "squeezed":
                values[0] = np.nan
            fields[label] |= {
                shape: values, f"{shape}_error": values / 9, f"{shape}_shot_noise": np.zeros(6)
            }  # fmt: skip
    scatter = {key: 0.1 * np.asarray(fields["truth"][key]) for key in ("variance", "voids", "equilateral")}
    return plain(
        {
            "box_size": 25.0, "n_mesh": 64, "redshift": 0.0, "split": "test",
            "side": side, "radius": radius, "edges": EDGES, "k": k,
            "steps": {"truth": ["truth"], "diffusion": ["draw0", "draw1"], "hod": ["hod"]},
            "fields": fields,
            "samples": {
                "diffusion": {
                    "number": 2, "scatter": scatter, "ranks": [170, 172, 170],
                    "statistic_ranks": [5, 6, 5], "coverage_ranks": [20, 22, 22],
                }
            },
        }
    )  # fmt: skip


@pytest.mark.parametrize("n_boxes", [1, 2])
def test_section_has_every_statistic(tmp_path, n_boxes):
    durable.write_text(tmp_path / "run.yaml", yaml.safe_dump({"name": "tiny", "steps": []}))
    simulations = {f"box_{n}": box(1 + 0.1 * n) for n in range(n_boxes)}
    durable.write_json(tmp_path / "fields" / FILE, {"simulations": simulations})
    durable.write_json(tmp_path / "other" / "metrics.json", [])
    steps = [Step(tmp_path / name, "", "done") for name in ("fields", "other")]
    artist = Artist(Run(tmp_path), tmp_path / "report", PALETTE)
    (block,) = field_blocks(artist, steps, lambda step, box: "near")
    assert len(block.images) == 8
    alts = " ".join(image.alt for image in block.images)
    assert "draw0" in alts
    variance = {1: "truth: 2.5 at 0.4 Mpc/h", 2: "truth: 2.62 at 0.4 Mpc/h"}[n_boxes]
    assert variance in alts
    assert ("thin lines: single boxes" in block.caption) == (n_boxes > 1)
    assert all((tmp_path / "report" / file).stat().st_size > 1000 for file in block.files)


def test_domains_have_figures_of_their_own(tmp_path):
    durable.write_text(tmp_path / "run.yaml", yaml.safe_dump({"name": "tiny", "steps": []}))
    durable.write_json(tmp_path / "fields" / FILE, {"simulations": {"a": box(), "b": box(1.1)}})
    artist = Artist(Run(tmp_path), tmp_path / "report", PALETTE)
    steps = [Step(tmp_path / "fields", "", "done")]
    blocks = field_blocks(artist, steps, lambda step, name: {"a": "near", "b": "far"}[name])
    assert [block.title for block in blocks] == ["near, z = 0", "far, z = 0"]


def test_many_predictions_are_shared_over_figures():
    labels = [f"step{n}{field}" for n in range(11) for field in ("", ":expected", ":samples")]
    assert [len(part) for part in chunks(labels)] == [4, 4, 3]
    assert [step for part in chunks(labels) for step in part] == [f"step{n}" for n in range(11)]
    assert chunks([]) == [[]]


def test_slopes_of_models_stand_beside_those_of_the_truth(tmp_path):
    durable.write_text(tmp_path / "run.yaml", yaml.safe_dump({"name": "tiny", "steps": []}))
    truth = {"slope": [-0.4, 1.5], "error": [0.1, 0.2]}
    blind = truth | {"slope": [0, 1.6], "difference": [0.4, 0.1], "difference_error": [0.05, 0.06]}
    quantities = {"n": {"truth": truth, "blind": blind}, "power/k0.3-1": {"truth": truth}}
    response = {"parameters": ["A_SN1", "sigma_8"], "quantities": quantities}
    durable.write_json(tmp_path / "all" / SPECTRA, {"simulations": {"a": {}, "b": {}}, "response": response})
    durable.write_json(tmp_path / "none" / SPECTRA, {"simulations": {}})
    steps = [Step(tmp_path / name, "", "done") for name in ("all", "none")]
    artist = Artist(Run(tmp_path), tmp_path / "report", PALETTE)
    (table,) = response_tables(artist, steps)
    assert table.groups == (("truth", 1), ("blind", 2))
    found = {(row.head, row.note): [(cell.text, cell.strong) for cell in row.cells] for row in table.rows}
    assert found["number of galaxies", "A_SN1"] == [
        ("-0.40 ± 0.10", False), ("0.00 ± 0.10", False), ("0.400 ± 0.050", True)
    ]  # fmt: skip
    assert found["number of galaxies", "sigma_8"][2] == ("0.100 ± 0.060", False)
    assert found["power, k = 0.3 to 1 h/Mpc", "A_SN1"] == [("-0.40 ± 0.10", False), ("", False), ("", False)]
    assert (tmp_path / "report" / table.file).exists()


def test_curves_are_what_was_given():
    x, value = np.array([1.0, 2.0, 4.0]), np.array([3.0, 0.0, 1.0])
    with plots.style():
        _, (ax,) = plots.figure()
        field_plots.plot_voids(ax, x, {"truth": Curve(value, np.array([1.0, 1.0, np.nan]))}, PALETTE)
    np.testing.assert_array_equal(ax.lines[0].get_xdata(), x)
    np.testing.assert_array_equal(ax.lines[0].get_ydata(), [3, np.nan, 1])
    with plots.style():
        _, (ax,) = plots.figure()
        field_plots.plot_distribution(
            ax,
            [-0.5, 0.5, 1.5, 3.5, 7.5],
            {"truth": Curve(np.array([0.5, 0.3, 0.2, 0]), np.zeros(4))},
            PALETTE,
            0.4,
        )
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [0.5, 0.3, 0.1])
    np.testing.assert_allclose(ax.lines[0].get_xdata(), [0.5, 1, np.sqrt(1.5 * 3.5)])
    assert [text.get_text() for text in ax.get_xticklabels()] == ["0", "1", "2"]


def test_coverage_is_drawn_on_its_levels():
    levels = np.linspace(0, 1, 5)
    with plots.style():
        _, (ax,) = plots.figure()
        field_plots.plot_expected_coverage(ax, levels, {"draw0": levels**2}, 100, PALETTE)
    np.testing.assert_array_equal(ax.lines[1].get_ydata(), levels**2)
