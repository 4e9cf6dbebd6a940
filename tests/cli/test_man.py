"""Man pages: one for each command, with what its help shows."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.cli.conftest import Cli

from tetrarch.cli.app import app
from tetrarch.cli.man import man_pages

PAGES = dict(man_pages(app))


def test_each_command_has_a_page_which_names_the_others() -> None:
    assert {"tetrarch", "tetrarch-run", "tetrarch-image", "tetrarch-image-pull"} <= PAGES.keys()
    for name in PAGES:
        # A command's own name may have a hyphen: attach-disk.
        words = name.split("-")
        parents = ["-".join(words[:count]) for count in range(len(words) - 1, 0, -1)]
        parent = next((parent for parent in parents if parent in PAGES), "tetrarch")
        written = f"{name.replace('-', chr(92) + '-')}(1)"
        assert name == "tetrarch" or written in PAGES[parent]


@pytest.mark.parametrize("command", ["run", "console", "disk create"])
def test_page_has_every_option_of_the_help(cli: Cli, command: str) -> None:
    page = PAGES[f"tetrarch-{command.replace(' ', '-')}"].replace("\\-", "-")
    options = set(
        re.findall(r"^ +(--[a-z-]+)", cli(*command.split(), "--help").stdout, re.MULTILINE)
    )
    assert "--help" in options
    assert [option for option in options if f".B {option}" not in page] == []


@pytest.mark.parametrize("name", PAGES)
def test_page_begins_as_man_wants_it(name: str) -> None:
    head, section, summary, *_ = PAGES[name].splitlines()
    assert head.startswith(f".TH {name.upper()} 1 ")
    assert section == ".SH NAME"
    assert summary.replace("\\-", "-").startswith(f"{name} - ")


def test_groff_has_no_complaint(cli: Cli, tmp_path: Path) -> None:
    if shutil.which("groff") is None:
        pytest.skip("no groff on this host")
    assert cli("man", tmp_path).returncode == 0
    pages = sorted((tmp_path / "man1").iterdir())
    assert len(pages) == len(PAGES)
    done = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww", *pages], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
