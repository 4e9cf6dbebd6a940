"""Each check runs on the interpreter, on the translator and on KVM, where there is one."""

from __future__ import annotations

import pytest
from tests.bare.check import Engine
from tests.conformance.conftest import ENGINES, require


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    name: str = request.param
    require(name)
    return Engine(name)
