"""Fixtures shared by all tests: where the real ALFWorld and WebShop data lie, if they are here."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data: $HIPER_FAST_DATA, else ../shared/data beside the checkout; skips without it."""
    root = Path(
        os.environ.get("HIPER_FAST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")
    )
    if not root.is_dir():
        pytest.skip(f"no real data at {root}; set HIPER_FAST_DATA to test against it")
    return root
