"""Debian's kernels with an initramfs of a stranger, as a user of ``tetrarch run`` boots them."""

import contextlib
import hashlib
import json
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.boot.vmlinux import extract_vmlinux
from tests.cli.conftest import Cli
from tests.initrds import JUDGED_APPEND, shell_tree

from tetrarch import images
from tetrarch.images import CachedGuest

OFF = "poweroff -f"

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(cli: Cli, debian_guest: CachedGuest, tmp_path: Path) -> Run:
    """``tetrarch run`` with a program ``script`` as init; more options replace the usual ones."""

    def run(script: str, *options: str | Path, kernel: Path | None = None, append: str | None = None):  # type: ignore[no-untyped-def]
        initrd = tmp_path / "initrd.gz"
        initrd.write_bytes(shell_tree(script).gzip())
        return cli(
            *("run", "--engine", "bt", "--kernel", kernel or debian_guest.kernel),
            *("--initrd", initrd, "--append", JUDGED_APPEND if append is None else append),
            *options,
        )

    return run
