"""Every test here runs three times: on KVM, on the interpreter, on the translator."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
from tests.conformance.guest import Guest

from tetrarch import _native

MakeGuest = Callable[[], Guest]


@pytest.fixture(params=["kvm", "interpreter", "translator"])
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    reason = _native.engine_available("kvm") if name == "kvm" else None
    if reason is not None:
        if os.environ.get("REQUIRE_KVM") == "1":
            pytest.fail(f"REQUIRE_KVM=1, but: {'; '.join(reason)}")
        pytest.skip("; ".join(reason))
    return name


@pytest.fixture
def make_guest(engine: str) -> MakeGuest:
    def make() -> Guest:
        return Guest("kvm" if engine == "kvm" else "bt", translate=engine == "translator")

    return make


@pytest.fixture
def guest(make_guest: MakeGuest) -> Guest:
    return make_guest()
