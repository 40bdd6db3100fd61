"""Fixtures that many tests share."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("UCX_NET_DEVICES", "lo")  # tests that use nbodykit in this process open no port either


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real simulation tables: ``GALDIST_SHARED_DATA``, or ``../shared/data`` beside the repo."""
    beside = Path(__file__).parents[1].parent / "shared" / "data"
    folder = Path(os.environ.get("GALDIST_SHARED_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder}: set GALDIST_SHARED_DATA to the folder that holds them")
    return folder
