"""The folders of steps whose result no longer fits: put aside, and taken back when it fits again."""

import re
import shutil
from pathlib import Path

from galdist.plan import REPLACED, PlannedStep, read_record, replaced_folder
from hpc import launch


class Replaced:
    """The ``.replaced/`` of a run in the folder ``out``."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._superseding: list[Path] = []

    def make_room(self, entry: PlannedStep) -> Path:
        """The step's folder, with what belongs to its fingerprint, or empty."""
        folder = self._out / entry.name
        if folder.exists() and read_record(folder).get("fingerprint") != entry.fingerprint:
            self.put_aside(entry.name)
        if not entry.again:
            self.take_back(entry)
        folder.mkdir(exist_ok=True)
        return folder

    def take_back(self, entry: PlannedStep) -> None:
        """Move a result that was put aside back into its place, and what is there out of the way."""
        folder = self._out / entry.name
        kept = replaced_folder(self._out, entry.name, entry.fingerprint)
        if read_record(kept).get("fingerprint") != entry.fingerprint:
            return
        if read_record(folder).get("fingerprint") == entry.fingerprint:
            return
        if folder.exists():
            self.put_aside(entry.name)
        kept.rename(folder)

    def put_aside(self, name: str, restorable: bool = True) -> None:
        """Move a step's folder to ``.replaced/<step>-<fingerprint>``, and end what still runs in it.

        What shall not come back gets a number.
        """
        folder = self._out / name
        launch.end_leftovers(folder)
        place = replaced_folder(self._out, name, str(read_record(folder).get("fingerprint", "unknown")))
        place.parent.mkdir(exist_ok=True)
        if restorable and not place.exists():
            folder.rename(place)
            return
        numbered = next(
            path
            for number in range(1, 10**6)
            if not (path := place.with_name(f"{place.name}.{number}")).exists()
        )
        if restorable:
            place.rename(numbered)
        folder.rename(place if restorable else numbered)
        self._superseding.append(numbered)

    def tidy(self) -> None:
        """Delete copies with a number, but of each step the one put aside last. One look at all of them."""
        latest = {path.name.rpartition("-")[0]: path.name for path in self._superseding}
        self._superseding.clear()
        for copy in (self._out / REPLACED).iterdir() if latest else ():
            # What no step made (of an unknown fingerprint) stays.
            match = re.fullmatch(r"(.+)-[0-9a-f]{8}\.\d+", copy.name)
            if match and latest.get(match[1], copy.name) != copy.name:
                shutil.rmtree(copy)
