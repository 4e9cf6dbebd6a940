"""Every test of a guest here runs on both engines."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from tests.pci.guest import Guest

from tetrarch import _native
from tetrarch.machine.config import EngineName


@pytest.fixture(params=["kvm", "bt"])
def engine(request: pytest.FixtureRequest) -> EngineName:
    name: EngineName = request.param
    reason = _native.engine_available("kvm") if name == "kvm" else None
    if reason is not None:
        if os.environ.get("REQUIRE_KVM") == "1":
            pytest.fail(f"REQUIRE_KVM=1, but: {'; '.join(reason)}")
        pytest.skip("; ".join(reason))
    return name


@pytest.fixture
def guest(engine: EngineName) -> Iterator[Guest]:
    with Guest(engine) as guest:
        yield guest
