"""A test of pytest that has a guest: pytest examples/test_guest.py."""

from typing import Any

import pytest

from tetrarch.testing.guest import Guest


@pytest.fixture
def tetrarch_options() -> dict[str, Any]:
    return {"engine": "bt", "memory": "256M"}


def test_guest_has_the_memory_that_it_was_given(tetrarch_guest: Guest) -> None:
    total = int(tetrarch_guest.run("awk '/MemTotal/ { print $2 }' /proc/meminfo"))
    assert 180_000 < total < 256 << 10
