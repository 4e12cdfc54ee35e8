"""Fixtures that every package's tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from cadtrain.ui import console

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real DeepCAD / Omni-CAD files that lies beside the checkout, if it does."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the real CAD files (../shared/data) are not beside this checkout")
    return SHARED_DATA


@pytest.fixture(autouse=True)
def _fresh_consoles() -> None:
    """Consoles keep the width that they were made with; a test's own COLUMNS must count."""
    console.out.cache_clear()
    console.err.cache_clear()
