"""What tests of networks share."""

import shutil

import pytest


@pytest.fixture
def need_passt() -> None:
    if shutil.which("passt") is None:
        pytest.skip("no passt: apt-get install passt")
