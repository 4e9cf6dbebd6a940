"""Every test here runs on KVM, on the interpreter and on the translator; those of one guest also
on one that is saved and goes on on the other engine again and again."""

from __future__ import annotations

import os

import pytest
from tests.conformance.guest import Guest
from tests.conformance.moved import MovedGuest

from tetrarch import _native

ENGINES = ("kvm", "interpreter", "translator")


def require(name: str) -> None:
    """Skips where the engine cannot run."""
    reason = None if name in ("interpreter", "translator") else _native.engine_available("kvm")
    if reason is not None:
        if os.environ.get("REQUIRE_KVM") == "1":
            pytest.fail(f"REQUIRE_KVM=1, but: {'; '.join(reason)}")
        pytest.skip("; ".join(reason))


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    require(name)
    return name


@pytest.fixture(params=[*ENGINES, "moved"])
def guest(request: pytest.FixtureRequest) -> Guest:
    name: str = request.param
    require(name)
    if name == "moved":
        return MovedGuest()
    return Guest("kvm" if name == "kvm" else "bt", translate=name == "translator")
