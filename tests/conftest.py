"""Fixtures that many tests share."""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# The same examples each time, and no limit on seconds: a test that passes here passes on a busy machine too.
# New examples are tried by `pytest --hypothesis-profile=default`.
settings.register_profile(
    "tests", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("tests")

# Programs that tests start and signal would ignore that too where the tests run in the background (`nohup`).
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)  # which programs started by this one do not inherit

os.environ.setdefault("UCX_NET_DEVICES", "lo")  # tests that use nbodykit in this process open no port either
# MPI ranks that wait sleep: where they outnumber the cores, those that spin hold up those that work.
os.environ.setdefault("MPIR_CVAR_ENABLE_HEAVY_YIELD", "1")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real simulation tables: ``GALDIST_SHARED_DATA``, or ``../shared/data`` beside the repo."""
    beside = Path(__file__).parents[1].parent / "shared" / "data"
    folder = Path(os.environ.get("GALDIST_SHARED_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}: set GALDIST_SHARED_DATA to the folder that holds them")
    return folder
