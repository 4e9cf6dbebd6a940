"""The examples of the documents run and print what they say; links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tests.docs.examples import ROOT, SEPARATOR, examples, program
from tests.share.test_shares import needs_virtiofsd

from tetrarch.images import CachedGuest

DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "bench/guest/README.md"]
)
# A guest of a few bytes takes well under a second, a Debian kernel a few.
LIMIT_S = 180

_LINK = re.compile(r"\[[^]]*\]\(([^)#]+)[^)]*\)")


def run(document: Path, directory: Path) -> list[str]:
    """What each example of the document printed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program(document)],
        cwd=directory,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split(f"{SEPARATOR}\n")[:-1]


@pytest.mark.parametrize(
    "name",
    [
        "control",
        "devices",
        "gdb",
        "platforms",
        "virtio",
        pytest.param("shares", marks=needs_virtiofsd),
    ],
)
def test_examples_of_a_page_print_what_it_says(tmp_path: Path, name: str) -> None:
    document = ROOT / "docs" / f"{name}.md"
    wanted = examples(document)
    printed = run(document, tmp_path)
    assert len(printed) == len(wanted)
    assert [text for text in printed if text] == [
        example.printed for example in wanted if example.printed is not None
    ]


def test_pci_page_shows_the_example_which_prints_what_it_says(
    tmp_path: Path, debian_guest: CachedGuest
) -> None:
    document = ROOT / "docs/pci.md"
    (example,) = examples(document)
    assert example.code == (ROOT / "examples/pci_device.py").read_text()
    assert run(document, tmp_path) == [example.printed]


def test_examples_of_the_python_page_print_what_it_says(
    tmp_path: Path, debian_guest: CachedGuest
) -> None:
    document = ROOT / "docs/python.md"
    printed = run(document, tmp_path)
    assert printed == [example.printed for example in examples(document)]


def test_first_script_of_the_readme_runs(tmp_path: Path, debian_guest: CachedGuest) -> None:
    (printed,) = run(ROOT / "README.md", tmp_path)
    assert debian_guest.manifest.release in printed
    assert "0x0000002A" in printed
    assert "the guest wrote 7" in printed
    assert printed.endswith("powered-off\n")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(document: Path) -> None:
    targets = _LINK.findall(document.read_text())
    missing = [
        target
        for target in targets
        if "://" not in target and not (document.parent / target).exists()
    ]
    assert not missing


def test_targets_of_make_are_explained_by_its_help() -> None:
    done = subprocess.run(
        ["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    shown = {line.split()[1] for line in done.stdout.splitlines()}
    assert shown >= {
        "setup",
        "run",
        "test",
        "test-long",
        "bench",
        "wheel",
        "lint",
        "fmt",
        "clean",
    }
