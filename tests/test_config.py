"""Run files: every mistake is found before work starts, and told so that it can be mended."""

import os
import re
import textwrap
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field
from small_stages import STAGES

from galdist import config
from galdist.config import ExternalPath, load
from hpc import strict
from hpc.resources import Resources
from hpc.site import Site, load_site
from hpc.strict import SettingsError, StrictModel, did_you_mean


def write(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text)
    return str(path)


def errors(folder: Path, text: str, *overrides: str) -> list[str]:
    """The lines of the error that a run file gives."""
    with pytest.raises(SettingsError) as caught:
        load(write(folder, text), overrides, STAGES)
    return str(caught.value).replace(f"{folder}/", "").splitlines()


GOOD = """\
name: study
seed: 3
steps:
  - name: first
    stage: pieces
    config: {n_pieces: 2}
  - name: second
    stage: mpi
    inputs: {before: first}
    resources: {ranks: 1, memory: 4 GB, time: "1:30:00"}
    config: {seed: 9, seconds: 1e-3}
  - name: third
    stage: many
    inputs: {sources: "*"}
"""


def test_a_good_file(tmp_path: Path) -> None:
    run = load(write(tmp_path, GOOD), (), STAGES)
    assert run.order == ("first", "second", "third")
    assert run.configs["first"].model_dump() == {"seed": 3, "n_pieces": 2, "seconds": 0.0}, "the run's seed"
    assert run.configs["second"].model_dump() == {"seed": 9, "n_pieces": 4, "seconds": 0.001}
    assert run.steps["second"].resources == Resources(ranks=1, memory=4 * 2**30, time=5400)
    assert run.steps["third"].inputs == {"sources": ("first", "second")}


def test_the_resolved_file_is_a_run_file(tmp_path: Path) -> None:
    run = load(write(tmp_path, GOOD), (), STAGES)
    again = load(write(tmp_path, run.to_yaml()), (), STAGES)
    assert again.configs == run.configs
    assert again.to_yaml() == run.to_yaml()


def test_every_mistake_at_once_with_line_and_path(tmp_path: Path) -> None:
    lines = errors(
        tmp_path,
        """\
name: Study
sed: 1
steps:
  - name: first
    stage: pieces
    config:
      n_peices: 2
      seconds: soon
  - name: second
    stage: mpl
  - name: third
    stage: one
    inputs: {sorce: first, more: [first, frist]}
  - name: fourth
    stage: many
    input: {sources: first}
""",
    )
    assert lines == [
        "run.yaml: 10 problems",
        "  line 1: name: a name has a-z, 0-9, _ and -, begins with a letter or digit, 100 at most; "
        "got 'Study'",
        "  line 2: sed: unknown key; did you mean seed?",
        "  line 7: steps.first.config.n_peices: unknown key; did you mean n_pieces?",
        "  line 8: steps.first.config.seconds: expected a valid number, unable to parse string as a number, "
        "got 'soon'",
        "  line 10: steps.second.stage: no stage 'mpl'; did you mean mpi?",
        "  line 13: steps.third.inputs.sorce: stage one has no such input; did you mean source?",
        "  line 13: steps.third.inputs.more: there is no step 'frist'; did you mean first?",
        "  line 13: steps.third.inputs.source: missing: name the step to read",
        "  line 13: steps.third.inputs.more: takes one step, got 2",
        "  line 16: steps.fourth.input: unknown key; did you mean inputs?",
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("name: second", "steps.first.name: two steps"),
        ("stage: one", "steps.second.inputs.source: missing: name the step to read"),
        ("inputs: {before: second}", "steps: steps wait for one another: second reads second"),
        ("inputs: {before: [first, first]}", "steps.second.inputs.before: names a step twice"),
        ("name: ../outside", "steps.1.name: "),
        ("name: .hidden", "steps.1.name: "),
        ("name: " + "a" * 101, "100 at most"),
        ("resources: {ranks: 0}", "steps.second.resources.ranks: expected greater than or equal to 1, got 0"),
        ("resources: {memory: much}", "expected an amount of memory such as 4 GB or 512 MB, got 'much'"),
        ("resources: {rank: 2}", "steps.second.resources.rank: unknown key; did you mean ranks?"),
        ("resources: {ranks: 2}", "steps.second.resources.ranks: stage pieces is one process"),
        ("config: 3", "steps.second.config: expected"),
        ("stage: 3", "steps.second.stage: expected a valid string, got 3"),
    ],
)
def test_one_mistake(change: str, said: str, tmp_path: Path) -> None:
    step = {"name": "second", "stage": "pieces"}
    step.update(yaml.safe_load(change))
    first = {"name": "second" if change == "name: second" else "first", "stage": "pieces"}
    if change == "name: second":
        said = "two steps are called second"
    text = "\n".join(errors(tmp_path, yaml.safe_dump({"name": "x", "steps": [first, step]})))
    assert said in text
    for jargon in ("pydantic", "http", "type=", "input_value", "Input should", "Value error"):
        assert jargon not in text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: [\n", "not valid YAML"),
        ("name: a\nname: b\n", "run.yaml: line 2: name: given twice (first on line 1)"),
        ("name: a\nsteps:\n  - {name: b, stage: pieces, config: {seed: 1, seed: 2}}\n", "given twice"),
        ("", "a run file holds keys and values"),
        ("[1, 2]", "a run file holds keys and values"),
        ("name: a\nsteps: []\n", "steps: expected"),
        ("name: a\nsteps: 3\n", "steps: expected"),
        ("name: a\nsteps: [3]\n", "steps.0: expected keys and values, got 3"),
        ("name: !!python/object/apply:os.system [true]\n", "not valid YAML"),
        ("name: &a [*a]\n", "contains itself"),
    ],
)
def test_what_is_no_run_file(text: str, said: str, tmp_path: Path) -> None:
    assert said in "\n".join(errors(tmp_path, text))


def test_a_syntax_error_has_its_line(tmp_path: Path) -> None:
    assert errors(tmp_path, "name: a\nsteps:\n  - name: b\n   stage: c\n")[0].startswith(
        "run.yaml: line 4, column"
    )


def test_cycles_are_shown(tmp_path: Path) -> None:
    steps = [
        {"name": "free", "stage": "pieces"},
        {"name": "a", "stage": "many", "inputs": {"sources": ["free", "c"]}},
        {"name": "b", "stage": "many", "inputs": {"sources": ["a"]}},
        {"name": "c", "stage": "many", "inputs": {"sources": ["b"]}},
    ]
    lines = errors(tmp_path, yaml.safe_dump({"name": "x", "steps": steps}))
    assert "steps wait for one another: a reads c reads b reads a" in lines[0]


def test_steps_run_after_what_they_read_else_in_the_order_of_the_file(tmp_path: Path) -> None:
    steps = [
        {"name": "a", "stage": "many", "inputs": {"sources": ["c"]}},
        {"name": "b", "stage": "pieces"},
        {"name": "c", "stage": "pieces"},
    ]
    assert load(write(tmp_path, yaml.safe_dump({"name": "x", "steps": steps})), (), STAGES).order == (
        "b",
        "c",
        "a",
    )


@given(st.data())
def test_any_order_in_the_file_works(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 8))
    edges = [(i, j) for i in range(n) for j in range(i) if data.draw(st.booleans())]
    shuffled = data.draw(st.permutations(range(n)))
    steps = [
        config.Step(
            name=f"s{i}", stage="pieces", inputs={"before": tuple(f"s{j}" for k, j in edges if k == i)}
        )
        for i in shuffled
    ]
    order, problems = config._order(steps)
    assert not problems
    assert sorted(order) == sorted(step.name for step in steps)
    assert all(order.index(f"s{j}") < order.index(f"s{i}") for i, j in edges)


# --set


def test_values_from_the_command_line(tmp_path: Path) -> None:
    sets = (
        "seed=5",
        "first.n_pieces=7",
        "steps.second.config.seconds=2",
        "second.resources.ranks=3",
        "name=other",
    )
    run = load(write(tmp_path, GOOD), sets, STAGES)
    assert run.file.name == "other"
    assert run.configs["first"].model_dump() == {"seed": 5, "n_pieces": 7, "seconds": 0.0}
    assert run.configs["second"].model_dump() == {"seed": 9, "n_pieces": 4, "seconds": 2.0}
    assert run.steps["second"].resources.ranks == 3


def test_a_value_from_the_command_line_is_of_one_step_alone(tmp_path: Path) -> None:
    """Steps may share their settings through an alias, whole or merged; one of them can still be changed."""
    text = """\
name: study
seed: 3
steps:
  - {name: first, stage: pieces, config: &shared {n_pieces: 2}}
  - {name: second, stage: pieces, config: *shared}
  - {name: third, stage: pieces, config: {<<: *shared, seconds: 1.0}}
"""
    run = load(write(tmp_path, text), ("first.n_pieces=7",), STAGES)
    assert [run.configs[step].model_dump()["n_pieces"] for step in run.order] == [7, 2, 2]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed", "'seed' is not key=value"),
        ("sede=1", "sede: unknown key; did you mean seed?"),
        ("steps=1", "steps: unknown key"),
        ("frist.n_pieces=1", "frist.n_pieces: there is no step 'frist'; did you mean first?"),
        ("first.n_peices=1", "steps.first.config.n_peices: unknown key; did you mean n_pieces?"),
        ("first.n_pieces=[", "first.n_pieces=[: not valid YAML"),
        ("first.n_pieces.x=1", "n_pieces holds a value, not keys"),
        ("first.n_pieces=many", "steps.first.config.n_pieces: expected a valid integer"),
    ],
)
def test_wrong_values_from_the_command_line(override: str, said: str, tmp_path: Path) -> None:
    assert said.replace("first.n_pieces=[: ", "") in "\n".join(errors(tmp_path, GOOD, override))


def test_elements_of_lists(tmp_path: Path) -> None:
    document = strict.parse_yaml("steps: [{name: a, config: {fields: [{name: x}, {name: y}]}}]", "f")
    assert config._apply("a.fields.1.name=z", document) == []
    assert document.data["steps"][0]["config"]["fields"] == [{"name": "x"}, {"name": "z"}]
    assert "2 is not an index of a list of 2" in config._apply("a.fields.2.name=z", document)[0].message


# Names and experiments


def test_an_experiment_that_is_not_there() -> None:
    with pytest.raises(SettingsError, match=r"no experiment has this name"):
        load("quikstart-of-nothing")


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(SettingsError, match=r"nothing/there\.yaml: cannot be read: No such file"):
        load("nothing/there.yaml")


@pytest.mark.parametrize("name", sorted(config.experiments()))
def test_experiments_that_ship_are_right(name: str) -> None:
    run = load(name)
    assert run.file.description, "galdist list shows it"
    assert config.experiments()[name].stem == run.file.name == name


# External paths


class WithPath(StrictModel):
    path: ExternalPath | None = None
    more: list[ExternalPath] = []  # noqa: RUF012 - pydantic copies it


def test_external_paths_are_absolute_and_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    found = WithPath.model_validate({"path": "data/../tng", "more": ["$SCRATCH/camels", "~/x", tmp_path]})
    texts = [str(path) for path in config.external_paths(found)]
    assert texts == [f"{tmp_path}/tng", "/scratch/me/camels", os.path.expanduser("~/x"), str(tmp_path)]
    assert WithPath.model_validate(found.model_dump(mode="json")) == found
    assert isinstance(found.path, Path)
    monkeypatch.delenv("SCRATCH")
    _, problems = strict.validate(WithPath, {"path": "$SCRATCH/camels"})
    assert problems[0].message == "$SCRATCH/camels names an environment variable that is not set"


# The words of strict models


class Circle(StrictModel):
    kind: Literal["circle"]
    radius: float


class Square(StrictModel):
    kind: Literal["square"]
    side: float


class Scheme(StrictModel):
    name: Literal["NGP", "CIC", "TSC"] = "CIC"


class Shapes(StrictModel):
    shape: Annotated[Circle | Square, Field(discriminator="kind")]
    schemes: dict[str, list[Scheme]] = {}  # noqa: RUF012
    split: int | list[str] = 1


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            {"shape": {"kind": "circle", "raduis": 1}},
            {"shape.raduis: unknown key; did you mean radius?", "shape.radius: missing"},
        ),
        (
            {"shape": {"kind": "square", "side": "a"}},
            {"shape.side: expected a valid number, unable to parse string as a number, got 'a'"},
        ),
        (
            {"shape": {"kind": "square", "side": 1}, "schemes": {"grid": [{"name": "NGP"}, {"name": "CCI"}]}},
            {"schemes.grid.1.name: expected 'NGP', 'CIC' or 'TSC', got 'CCI'; did you mean CIC?"},
        ),
        (
            {"shape": {"kind": "square", "side": 1}, "schemes": {"grid": [{"nam": "NGP"}]}},
            {"schemes.grid.0.nam: unknown key; did you mean name?"},
        ),
    ],
)
def test_places_inside_models(data: dict[str, object], said: set[str]) -> None:
    _, problems = strict.validate(Shapes, data)
    assert {f"{'.'.join(map(str, problem.location))}: {problem.message}" for problem in problems} == said


def test_alternatives_are_one_problem() -> None:
    _, problems = strict.validate(Shapes, {"shape": {"kind": "square", "side": 1}, "split": "x"})
    assert len(problems) == 1
    assert problems[0].location == ("split",)
    assert "integer" in problems[0].message
    assert "list" in problems[0].message


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "-2e5", "1.5e3", "+1e3"])
def test_numbers_as_people_write_them(text: str) -> None:
    assert strict.parse_yaml(f"value: {text}", "f").data == {"value": float(text)}


# Sites and resources


def test_sites(tmp_path: Path) -> None:
    assert load_site("local") == Site()
    assert load_site("debug").launcher == "debug"
    path = tmp_path / "site.yaml"
    path.write_text("cpus: 3\nenvironment: {A: b}\n")
    site = load_site(str(path))
    assert (site.cores, site.environment) == (3, {"A": "b"})
    path.write_text("cpsu: 3\n")
    with pytest.raises(SettingsError, match=r"site\.yaml: line 1: cpsu: unknown key; did you mean cpus\?"):
        load_site(str(path))
    with pytest.raises(SettingsError, match="no such site"):
        load_site("loacl")
    with pytest.raises(FileNotFoundError, match="of the site file does not exist"):
        Site(mpirun=tmp_path / "none").find_mpirun()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90 s", 90), ("2 h", 7200), ("1:30:00", 5400), ("12:30", 750), ("1-00:00:00", 86400), (60, 60)],
)
def test_times(text: str | int, seconds: int) -> None:
    assert Resources.model_validate({"time": text}).time == seconds


@pytest.mark.parametrize(
    ("text", "n_bytes"), [("4 GB", 2**32), ("512MiB", 2**29), ("1.5G", 3 * 2**29), (1000, 1000)]
)
def test_memory(text: str | int, n_bytes: int) -> None:
    assert Resources.model_validate({"memory": text}).memory == n_bytes


@pytest.mark.parametrize(("name", "end"), [("CV_00", "; did you mean 'CV_0'?"), ("matter", "."), ("", ".")])
def test_the_nearest_name_or_a_full_stop(name: str, end: str) -> None:
    assert did_you_mean(name, ["CV_0", "LH_77"]) == end


# Sweeps


SWEPT = """\
name: study
seed: 9
steps:
  - name: grids
    stage: pieces
  - name: classifier
    stage: pieces
    inputs: {before: grids}
    sweep: {seed: [1, 2], n_pieces: [2, 3]}
    at_once: 2
  - name: regressor
    stage: one
    inputs: {source: classifier, more: grids}
    sweep: classifier
  - name: predict
    stage: one
    inputs: {source: regressor, more: classifier}
    sweep: regressor
  - name: report
    stage: many
    inputs: {sources: "*"}
"""
SUFFIXES = [f"-seed{seed}-n_pieces{number}" for seed in (1, 2) for number in (2, 3)]


HALOS = """\
name: study
steps:
  - name: learned  # before the table in the file
    stage: train
    inputs: {catalogs: halos}
    sweep: {seed: [1, 2]}
    config:
      epochs: 1
      model: {name: sqr, inputs: [log_halo_mass, Omega_m, A_SN1, n_gal], targets: [log_stellar_mass]}
  - name: balanced
    stage: smogn
    inputs: {catalogs: halos}
    config: {inputs: [log_halo_mass], targets: [log_stellar_mass, metals]}
  - name: learned-balanced
    stage: train
    inputs: {catalogs: balanced}
    config: {epochs: 1, model: {name: sqr, inputs: [log_halo_mass], targets: [metals]}}
  - name: forest
    stage: baseline
    inputs: {catalogs: halos}
    config: {method: random-forest, inputs: [log_halo_mass, overdensity], targets: [metals]}
  - name: matched
    stage: baseline
    inputs: {catalogs: halos}
    config: {method: abundance-matching, targets: [log_stellar_mass]}
  - name: halos
    stage: centrals
    config:
      tables:
        - simulation: Box
          file: halos.parquet
          box_size: 50
          simulation_column: sim
          parameters: {file: parameters.csv, column: sim, astrophysics: [n_gal]}
          position: [x, y, z]
          overdensity: {}
          columns: {log_halo_mass: M, log_stellar_mass: mstar, metals: {column: Z, units: dex}}
"""


@pytest.mark.parametrize(
    ("old", "new", "wrong"),
    [
        ("n_gal], targets: [", "n_gal], targets: [log_metals, ", ["learned"]),
        ("Omega_m", "omega_m", ["learned"]),
        ("n_gal]}", "n_galaxies]}", ["learned"]),
        ("metals]}\n", "metal]}\n", ["balanced"]),
        ("overdensity], t", "environment], t", ["forest"]),
        ("overdensity: {}", "filter: {}", ["forest"]),
        ("log_stellar_mass: m", "log_stelar_mass: m", ["learned", "balanced", "matched"]),
        ("M, log_stellar_mass", "M, halo_mass", ["learned", "balanced", "matched"]),
        ("box_size: 50", "box_size: wide", []),  # nothing is said of tables that nobody knows
    ],
)
def test_columns_are_looked_for_before_there_are_tables(
    old: str, new: str, wrong: list[str], tmp_path: Path
) -> None:
    load(write(tmp_path, HALOS), (), config.STAGES)
    with pytest.raises(SettingsError) as caught:
        load(write(tmp_path, HALOS.replace(old, new, 1)), (), config.STAGES)
    lines = [line for line in str(caught.value).splitlines() if "step halos: column" in line]
    said = r"steps\.(\w+)\.inputs: step halos: column '\w+' is not there.* It has: "
    assert [re.search(said, line)[1] for line in lines] == wrong


def test_columns_of_group_catalogs_are_looked_for_before_there_are_any(tmp_path: Path) -> None:
    text = """\
name: study
steps:
  - {name: groups, stage: catalog, config: {path: CAMELS}}
  - {name: halos, stage: centrals, inputs: {catalogs: groups}}
  - name: learned
    stage: train
    inputs: {catalogs: halos}
    config: {epochs: 1, model: {name: sqr, inputs: [log_halo_mass, spin, sigma_8, A_AGN2]}}
"""
    load(write(tmp_path, text), (), config.STAGES)
    with pytest.raises(SettingsError, match=r"column 'formation_redshift' is not there"):
        load(write(tmp_path, text.replace("spin", "formation_redshift")), (), config.STAGES)
    trees = "halos.halos.trees={path: trees, snapshot: 99, redshifts: z.txt}"
    load(write(tmp_path, text.replace("spin", "formation_redshift")), (trees,), config.STAGES)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("{name: r2unet-classifier, inputs: [{field: matter_mass}]}", "'matter_mass'"),
        ("{name: inception-classifier, target: galaxy_count}", "'galaxy_count' is not there; did you mean"),
        ("{name: vdm, targets: [{field: stellar_mass}]}", "'stellar_mass'"),
        ("{name: necola}", "'displacement'"),
    ],
)
def test_fields_are_looked_for_before_there_are_grids(model: str, said: str, tmp_path: Path) -> None:
    text = """\
name: study
steps:
  - {name: grids, stage: ingest, config: {path: CAMELS}}
  - {name: learned, stage: train, inputs: {grids: grids}, config: {epochs: 1, model: MODEL}}
"""
    load(write(tmp_path, text.replace("MODEL", "{name: vdm}")), (), config.STAGES)
    with pytest.raises(SettingsError, match=f"steps.learned.inputs: step grids: field {said}"):
        load(write(tmp_path, text.replace("MODEL", model)), (), config.STAGES)


@pytest.mark.parametrize(
    ("model", "inputs", "said"),
    [
        (
            "nn-gauss",
            "{}",
            "the step's inputs must have steps under `catalogs`; of grids and catalogs they have none",
        ),
        (
            "nn-gauss",
            "{grids: tables}",
            "under `catalogs` and no others; of grids and catalogs they have grids",
        ),
        ("nn-gauss", "{catalogs: tables, grids: tables}", "they have grids: [tables], catalogs: [tables]"),
        ("r2unet-classifier", "{catalogs: tables}", "r2unet-classifier learns from grids"),
        ("nn-gauss", "{catalogs: tables}", None),
        ("r2unet-classifier", "{grids: tables}", None),
    ],
)
def test_a_training_reads_what_its_model_learns_from(
    model: str, inputs: str, said: str | None, tmp_path: Path
) -> None:
    text = f"""\
name: study
steps:
  - {{name: tables, stage: pieces}}
  - name: learned
    stage: train
    inputs: {inputs}
    sweep: {{seed: [1, 2]}}
    config: {{model: {{name: {model}}}, epochs: 1}}
"""
    stages = STAGES | {"train": config.STAGES["train"]}
    if said is None:
        assert load(write(tmp_path, text), (), stages).order == ("tables", "learned-seed1", "learned-seed2")
        return
    with pytest.raises(SettingsError) as caught:
        load(write(tmp_path, text), (), stages)
    (line,) = str(caught.value).splitlines()
    assert "steps.learned.inputs: " in line
    assert said in line


MODELS = """\
name: study
steps:
  - {name: grids, stage: ingest, config: {path: CAMELS}}
  - name: table
    stage: train
    inputs: {catalogs: halos}
    config: {epochs: 1, model: {name: sqr, inputs: [log_halo_mass]}}
  - name: mean
    stage: train
    inputs: {grids: grids, models: classifier}
    config: {epochs: 1, model: {name: r2unet-regressor}}
  - name: counts
    stage: train
    inputs: {grids: grids, models: classifier}
    config: {epochs: 1, model: {name: inception-regressor, loss: poisson}}
  - name: diffusion
    stage: train
    inputs: {grids: grids, models: counts}
    config: {epochs: 1, model: {name: vdm, targets: [{field: galaxy_counts, quantum: 1, most: 9}]}}
  - {name: drawn, stage: predict, inputs: {grids: grids, model: diffusion}, config: {drawing: {crop: 32}}}
  - {name: sampled, stage: predict, inputs: {grids: grids, model: counts}, config: {samples: 3}}
  - {name: predicted, stage: predict, inputs: {grids: grids, model: mean}}
  - name: classifier
    stage: train
    inputs: {grids: grids}
    config: {epochs: 1, model: {name: inception-classifier}}
  - {name: groups, stage: catalog, config: {path: CAMELS}}
  - {name: halos, stage: centrals, inputs: {catalogs: groups}}
"""


@pytest.mark.parametrize(
    ("override", "step", "said"),
    [
        ("mean.inputs.models=[]", "mean", "on one trained classifier; `models` gives none: name the step"),
        (
            "mean.inputs.models=[classifier, counts]",
            "mean",
            "gives inception-classifier, inception-regressor",
        ),
        ("mean.inputs.models=table", "mean", "r2unet-regressor builds on one trained .* gives sqr:"),
        ("mean.model.target=matter_counts", "mean", "'matter_counts' but the classifier .* 'galaxy_counts'"),
        ("classifier.model.inputs=[{field: x}]", "mean", "step grids: field 'x' is not there"),
        ("mean.inputs.models=grids", "mean", "step grids trains no model: name a step of the stage train"),
        (
            "counts.inputs.models=mean",
            "counts",
            "builds on one trained classifier; .* gives r2unet-regressor",
        ),
        ("classifier.inputs.models=table", "classifier", "inception-classifier builds on no other model"),
        ("table.inputs.models=mean", "table", "sqr builds on no other model, but 1 were given"),
        (
            "diffusion.inputs.models=mean",
            "diffusion",
            "a likelihood, or on nothing; `models` gives r2unet-reg",
        ),
        (
            "diffusion.inputs.models=[counts, mean]",
            "diffusion",
            "gives inception-regressor, r2unet-regressor",
        ),
        ("diffusion.model.spatial=2", "diffusion", "quantum: 1 and most, and spatial: 3"),
        ("diffusion.model.targets.0.quantum=2", "diffusion", "how many galaxy_counts a voxel of three dim"),
        ("diffusion.model.targets.0.most=null", "diffusion", "a vdm on it has that among its targets"),
        ("predicted.samples=2", "predicted", r"samples is 2, but step mean \(r2unet-regressor\) gives means"),
        ("drawn.inputs.model=mean", "drawn", r"{'crop': 32}, but step mean \(r2unet.*\) predicts each voxel"),
        ("predicted.inputs.model=table", "predicted", r"step table is a model of tables \(sqr\)"),
        ("predicted.inputs.model=halos", "predicted", "step halos trains no model"),
        ("counts.inputs.models=[]", None, None),
        ("diffusion.inputs.models=[]", None, None),
        ("diffusion.inputs.models=[counts]", None, None),
    ],
)
def test_models_that_do_not_fit_are_refused_before_any_is_trained(
    override: str, step: str | None, said: str | None, tmp_path: Path
) -> None:
    path = write(tmp_path, MODELS)
    if step is None:
        load(path, (override,), config.STAGES)
        return
    with pytest.raises(SettingsError) as caught:
        load(path, (override,), config.STAGES)
    lines = [line for line in str(caught.value).splitlines() if f"steps.{step}." in line]
    assert len(lines) == 1
    assert re.search(rf"steps\.{step}\.inputs: .*{said}", lines[0])


def test_a_model_with_mistakes_of_its_own_is_not_held_against_those_on_it(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        load(write(tmp_path, MODELS), ("classifier.epochs=0",), config.STAGES)
    (line,) = str(caught.value).splitlines()
    assert "steps.classifier.config.epochs" in line


def test_a_sweep_makes_a_step_of_each_value(tmp_path: Path) -> None:
    run = load(write(tmp_path, SWEPT), (), STAGES)
    swept = [f"{name}{suffix}" for name in ("classifier", "regressor", "predict") for suffix in SUFFIXES]
    assert run.order == ("grids", *swept, "report")
    assert run.steps["report"].inputs == {"sources": ("grids", *swept)}, "a reader without a sweep reads all"
    for seed in (1, 2):
        for number in (2, 3):
            suffix = f"-seed{seed}-n_pieces{number}"
            assert run.steps[f"classifier{suffix}"].inputs == {"before": ("grids",)}
            assert run.configs[f"classifier{suffix}"].model_dump() == {
                "seed": seed,
                "n_pieces": number,
                "seconds": 0.0,
            }
            own = {"source": (f"regressor{suffix}",), "more": (f"classifier{suffix}",)}
            assert run.steps[f"predict{suffix}"].inputs == own, "each reads its own members, and no other"
            assert run.configs[f"predict{suffix}"].model_dump()["seed"] == seed, (
                "a sweep over the seed is one"
            )
            assert run.configs[f"predict{suffix}"].model_dump()["n_pieces"] == 4, (
                "other keys are not handed on"
            )
    assert run.configs["report"].model_dump()["seed"] == 9
    assert list(run.sweeps) == ["classifier", "regressor", "predict"]
    assert run.sweeps["regressor"].members == tuple(f"regressor{suffix}" for suffix in SUFFIXES)
    assert [sweep.at_once for sweep in run.sweeps.values()] == [2, None, None]


def test_the_resolved_file_has_the_members_as_plain_steps(tmp_path: Path) -> None:
    run = load(write(tmp_path, SWEPT), (), STAGES)
    again = load(write(tmp_path, run.to_yaml()), (), STAGES)
    assert again.configs == run.configs
    assert again.order == run.order
    assert {name: step.inputs for name, step in again.steps.items()} == {
        name: step.inputs for name, step in run.steps.items()
    }
    assert again.sweeps == {}


def test_values_for_a_swept_step_are_for_all_members(tmp_path: Path) -> None:
    sets = ("classifier.seconds=2", "classifier.sweep.seed=[7]", "regressor.seed=3", "classifier.at_once=5")
    run = load(write(tmp_path, SWEPT), sets, STAGES)
    members = run.sweeps["classifier"].members
    assert members == ("classifier-seed7-n_pieces2", "classifier-seed7-n_pieces3")
    assert {run.configs[name].model_dump()["seconds"] for name in members} == {2.0}
    followers = run.sweeps["regressor"].members
    assert {run.configs[name].model_dump()["seed"] for name in followers} == {3}, "its own seed comes first"
    assert run.sweeps["classifier"].at_once == 5


def test_one_member_can_be_read(tmp_path: Path) -> None:
    sets = ("report.inputs.sources=[classifier-seed1-n_pieces2]",)
    run = load(write(tmp_path, SWEPT), sets, STAGES)
    assert run.steps["report"].inputs == {"sources": ("classifier-seed1-n_pieces2",)}


@pytest.mark.parametrize(
    ("sweep", "names"),
    [
        ("{seed: [1]}", ["a-seed1"]),
        ("{a.rate: [1e-3, 3e-4], b.x: [true]}", ["a-rate0_001-xtrue", "a-rate0_0003-xtrue"]),
        ("{a.x: [1], b.x: [BF16]}", ["a-a_x1-b_xbf16"]),
        ("{channels: [[8, 16], [16, 32]]}", ["a-channels8-16", "a-channels16-32"]),
    ],
)
def test_names_of_members(sweep: str, names: list[str]) -> None:
    step = config.Step.model_validate(
        {"name": "a", "stage": "x", "sweep": yaml.safe_load(sweep.replace("e-", ".0e-"))}
    )
    assert isinstance(step.sweep, dict)
    assert [f"a{member.suffix}" for member in config._product(step.sweep)] == names


def test_the_sweep_in_the_docs(tmp_path: Path) -> None:
    page = Path(__file__).parents[1] / "docs" / "run-files.md"
    example = page.read_text().partition("## Sweeps")[2].partition("```yaml\n")[2].partition("```")[0]
    steps = [{"name": "universe", "stage": "simulate", "config": {"suite": "MockA", "simulations": 8}}]
    grids = {"name": "grids", "stage": "ingest", "inputs": {"simulations": "universe"}}
    steps += [{**grids, "config": {"n_mesh": 64, "split": {"test": ["CV_7"]}}}]
    head = yaml.safe_dump({"name": "x", "seed": 9, "steps": steps})
    run = load(write(tmp_path, head + textwrap.dedent(example)))
    for seed in (1, 2, 3):
        assert run.steps[f"regressor-seed{seed}"].inputs["models"] == (f"classifier-seed{seed}",)
        assert run.configs[f"regressor-seed{seed}"].model_dump()["seed"] == seed
        assert run.steps[f"predictions-seed{seed}"].inputs["model"] == (f"regressor-seed{seed}",)
    assert len(run.steps["spectra"].inputs["predictions"]) == 3
    assert len(run.order) == 2 + 9 + 2


def test_a_key_inside_a_key() -> None:
    """The other values of the configuration stay as they are."""
    name = "classifier-betas0_8-0_9-seed1"
    sweep = "classifier.sweep={optimizer.betas: [[0.9, 0.99], [0.8, 0.9]], seed: [1]}"
    run = load("quickstart", (sweep, f"regressor.inputs.models={name}"))
    assert run.sweeps["classifier"].members == ("classifier-betas0_9-0_99-seed1", name)
    plain = load("quickstart").configs["classifier"].model_dump()
    plain["optimizer"]["betas"] = (0.8, 0.9)
    assert run.configs[name].model_dump() == {**plain, "seed": 1}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("classifier.sweep.sed=[1]", "line 9: steps.classifier.sweep.sed: unknown key; did you mean seed?"),
        (
            "classifier.sweep.seed=[]",
            "steps.classifier.sweep: seed: expected a list of one or more values, got []",
        ),
        (
            "classifier.sweep.seed=3",
            "steps.classifier.sweep: seed: expected a list of one or more values, got 3",
        ),
        ("classifier.sweep={}", "steps.classifier.sweep: expected KEY: [values], such as {seed: [1, 2, 3]}"),
        ("classifier.sweep=[1]", "or the name of a swept step, got [1]"),
        (
            "classifier.sweep.seed=[1, one]",
            "line 9: steps.classifier.sweep.seed: expected a valid integer, unable to parse string as an "
            "integer, got 'one'",
        ),
        (
            "classifier.sweep={n_pieces.x: [1]}",
            "line 9: steps.classifier.sweep.n_pieces.x: expected a valid integer, got {'x': 1}",
        ),
        ("classifier.sweep={seed: [{a: 1}]}", "seed: a swept value is a number, a word or a list of them"),
        (
            "classifier.sweep={seed: [1, 1]}",
            "steps.classifier.sweep: makes a second step called classifier-seed1",
        ),
        (
            "classifier.n_pieces=3",
            "steps.classifier.sweep.n_pieces: is set in config too: leave it out of one",
        ),
        ("classifier.at_once=0", "steps.classifier.at_once: expected greater than or equal to 1, got 0"),
        ("grids.at_once=2", "steps.grids.at_once: is for steps with a sweep, and here is none"),
        (
            "regressor.sweep=grids",
            "steps.regressor.sweep: grids is not swept: give it `sweep: {KEY: [values]}`",
        ),
        (
            "regressor.sweep=clasifier",
            "steps.regressor.sweep: there is no step 'clasifier'; did you mean classifier?",
        ),
        ("regressor.sweep=predict", "no keys are swept: regressor follows predict follows regressor"),
        (
            "regressor.sweep=null",
            "steps.regressor.inputs.source: takes one step, got 4; with `sweep: classifier` this step is "
            "done for each member of classifier",
        ),
        ("classifier-seed1-n_pieces2.seed=1", "there is no step 'classifier-seed1-n_pieces2'"),
        ("report.name=classifier-seed1-n_pieces2", "two steps are called classifier-seed1-n_pieces2"),
        (
            "classifier.name=" + "a" * 90,
            f"makes a step called {'a' * 90}-seed1-n_pieces2: 100 letters at most",
        ),
        (
            f"classifier.sweep={{seed: {list(range(10_001))}}}",
            "steps.classifier.sweep: makes 10001 steps of one, 10000 at most",
        ),
    ],
)
def test_wrong_sweeps(override: str, said: str, tmp_path: Path) -> None:
    assert said in "\n".join(errors(tmp_path, SWEPT, override))


def test_a_wrong_sweep_is_one_mistake(tmp_path: Path) -> None:
    """Steps that follow it, or read it, are not blamed; nor is what all members share said of each."""
    for override in ("classifier.sweep.seed=[]", "classifier.sweep.sed=[1]", "classifier.config.sed=1"):
        (line,) = errors(tmp_path, SWEPT, override)
        assert "steps.classifier." in line
