"""Measure, and write ``docs/benchmarks.md`` and others: ``python tests/benchmarks/run.py [NAME ...]``.

A benchmark is a file ``bench_<name>.py`` in this folder with

- a docstring in Markdown: its first line is the title of a section, the rest says what is measured and how;
- ``run()``, which gives the rows of a table: a list of dicts with the same keys, which are the columns. A
dict of
  such lists gives several tables; its keys are their captions. Numbers are written with three significant
  digits (integers in full), None as an empty cell;
- where its section belongs on another page of ``docs/``, ``PAGE``, that page's name. What stands above the
  sections of a page is written by hand and kept.

Ratios are what travels between machines, so what is compared is timed in one call of ``run``. Every
benchmark runs in a process of its own; NAMEs (``ingest``, ``crops``) measure these alone and keep the
page's other sections.
"""

import argparse
import importlib
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
PACKAGES = ("numpy", "numba", "zarr", "zarrs", "dask", "torch")

Rows = Sequence[Mapping[str, Any]]


def main() -> None:
    """Measure what is named (all by default) and write the page."""
    known = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; all by default")
    parser.add_argument(
        "--measure", type=Path, help=argparse.SUPPRESS
    )  # this process measures, into the file
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.names) - set(known)):
        parser.error(f"no benchmark {unknown[0]!r}; there are {', '.join(known)}")
    if arguments.measure:
        arguments.measure.write_text(json.dumps(measure(arguments.names[0])))
        return
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.names or known:
            print(f"{name} ...", flush=True)
            results = Path(folder) / f"{name}.json"
            command = [sys.executable, __file__, name, "--measure", str(results)]
            subprocess.run(command, check=True, cwd=HERE.parents[1])
            page = DOCS / f"{getattr(load(name), 'PAGE', 'benchmarks')}.md"
            head, sections = read_page(page)
            sections[name] = section(name, json.loads(results.read_text()))
            write_page(page, head, {key: text for key, text in sections.items() if key in known})


def load(name: str) -> Any:
    """The module of a benchmark, which may import its neighbors, the tests' helpers and galdist."""
    sys.path[:0] = [
        str(folder) for folder in (HERE, HERE.parent, HERE.parents[1]) if str(folder) not in sys.path
    ]
    return importlib.import_module(f"bench_{name}")


def measure(name: str) -> dict[str, list[dict[str, Any]]]:
    """Tables of a benchmark by caption."""
    found = load(name).run()
    tables = found if isinstance(found, Mapping) else {"": found}
    return {caption: [dict(row) for row in rows] for caption, rows in tables.items()}


def section(name: str, tables: Mapping[str, Rows]) -> str:
    """Markdown of a benchmark's results."""
    title, _, text = (load(name).__doc__ or name).strip().partition("\n")
    lines = [f"## {title.rstrip('.')}", "", *([text.strip(), ""] if text.strip() else [])]
    for caption, rows in tables.items():
        lines += [f"**{caption}**", ""] if caption else []
        lines += [table(rows), ""]
    return "\n".join([*lines, f"Measured on {date.today()}: {machine()}."])


def table(rows: Rows) -> str:
    """A Markdown table."""
    columns = list(rows[0])
    numbers = {column: any(isinstance(row[column], int | float) for row in rows) for column in columns}
    lines = [
        "| " + " | ".join(columns) + " |",
        "|" + "|".join("---:" if numbers[column] else "---" for column in columns) + "|",
    ]
    lines += ["| " + " | ".join(cell(row[column]) for column in columns) + " |" for row in rows]
    return "\n".join(lines)


def cell(value: Any) -> str:
    """A value with three significant digits; integers in full."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.3g}".rstrip(".")
    return f"{value:,}" if isinstance(value, int) else str(value)


def machine() -> str:
    """Processor, cores, how busy it was, and versions."""
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists() and (match := re.search(r"model name\s*: (.*)", information.read_text())):
        processor = match[1]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    packages = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    load = os.getloadavg()[2]  # includes the benchmark's own processes
    return (
        f"{processor}, {cores} cores, load average {load:.1f}, Python {platform.python_version()}, {packages}"
    )


def read_page(page: Path) -> tuple[str, dict[str, str]]:
    """What stands above the sections of a page, and the sections by name."""
    parts = re.split(r"<!-- benchmark: (\w+) -->\n", page.read_text(encoding="utf-8"))
    return parts[0], {name: text.strip() for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def write_page(page: Path, head: str, sections: Mapping[str, str]) -> None:
    """Write a page of ``docs/``."""
    parts = [f"<!-- benchmark: {name} -->\n{text}\n" for name, text in sorted(sections.items())]
    page.write_text("\n".join([head.rstrip() + "\n", *parts]), encoding="utf-8")


if __name__ == "__main__":
    main()
