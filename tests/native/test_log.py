"""What the Rust core has to tell goes through Python's logging."""

import subprocess
import sys

import pytest

from tetrarch import _native

# Of a process of its own: a refusal is told once in each.
SCRIPT = """
import logging
logging.basicConfig(level=logging.DEBUG, format="%(levelname)s %(name)s: %(message)s")
from tetrarch import _native
for _ in range(2):
    _native.Vm("kvm", 1 << 20)
"""


def test_refused_msrs_are_told_once_by_the_logger_of_the_engine() -> None:
    reason = _native.engine_available("kvm")
    if reason is not None:
        pytest.skip("; ".join(reason))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=60
    )
    lines = done.stderr.splitlines()
    if not lines:
        pytest.skip("this host's KVM refuses no MSR")
    for line in lines:
        level, _, told = line.partition(" ")
        assert level in {"DEBUG", "WARNING"}
        assert told.startswith("tetrarch.kvm: kvm: the host refuses MSR 0x")
    assert len(set(lines)) == len(lines)
