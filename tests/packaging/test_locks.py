"""The locked versions are those that the package asks for, and those that run here."""

import json
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 120
LONG_LIMIT_S = 1200


def locked(name: str) -> dict[str, str]:
    """Package and version of each entry that applies here."""
    pins = {}
    for text in entries(name):
        requirement = Requirement(text.partition(" --hash=")[0])
        (pin,) = requirement.specifier
        assert pin.operator == "=="
        if requirement.marker is None or requirement.marker.evaluate():
            pins[requirement.name] = pin.version
    return pins


def entries(name: str) -> Iterator[str]:
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            yield re.sub(r"\s+", " ", line.strip())


def project() -> dict[str, list[str]]:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    run: list[str] = table["dependencies"]
    return {"run": run, "dev": run + table["optional-dependencies"]["dev"]}


@pytest.mark.parametrize("name", ["run", "dev"])
def test_each_entry_has_a_hash(name: str) -> None:
    found = list(entries(name))
    assert len(found) > 5
    assert [text for text in found if "--hash=sha256:" not in text] == []


@pytest.mark.parametrize("name", ["run", "dev"])
def test_what_the_package_asks_for_is_locked(name: str) -> None:
    pins = locked(name)
    for text in project()[name]:
        requirement = Requirement(text)
        assert pins.get(canonicalize_name(requirement.name), "") in requirement.specifier, (
            f"{text}: run make lock"
        )


def test_run_time_versions_are_those_of_development() -> None:
    assert locked("run").items() <= locked("dev").items()


def test_tests_run_with_the_locked_versions() -> None:
    pins = locked("dev")
    assert {name: metadata.version(name) for name in pins} == pins, "run make setup"


def environment() -> dict[str, str]:
    # Not what an outer cargo or make says of itself.
    return {k: v for k, v in os.environ.items() if not k.startswith(("CARGO_MAKE", "MAKE"))}


def test_no_crate_needs_a_newer_rust_than_the_one_that_is_stated() -> None:
    done = subprocess.run(
        ["cargo", "metadata", "--locked", "--format-version", "1"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        check=True,
        timeout=LIMIT_S,
    )
    crates = json.loads(done.stdout)["packages"]
    ours = {crate["rust_version"] for crate in crates if crate["source"] is None}
    (stated,) = ours
    assert stated is not None
    newer = {
        crate["name"]: crate["rust_version"]
        for crate in crates
        if crate["rust_version"] and version(crate["rust_version"]) > version(stated)
    }
    assert newer == {}


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))[:2]


@pytest.mark.long
@pytest.mark.timeout(LONG_LIMIT_S)
def test_the_oldest_rust_that_is_stated_builds_everything() -> None:
    stated = tomllib.loads((ROOT / "Cargo.toml").read_text())
    oldest = stated["workspace"]["package"]["rust-version"]
    if shutil.which("rustup") is None:
        pytest.skip("no rustup, which has several versions of Rust side by side")
    there = subprocess.run(
        ["rustup", "run", oldest, "rustc", "--version"], capture_output=True, check=False
    )
    if there.returncode != 0:
        pytest.skip(f"Rust {oldest} is not there; rustup toolchain install {oldest}")
    subprocess.run(
        ["rustup", "run", oldest, "cargo", "check", "--workspace", "--all-targets", "--locked"],
        cwd=ROOT,
        env={**environment(), "CARGO_TARGET_DIR": str(ROOT / "target" / "oldest")},
        check=True,
        timeout=LONG_LIMIT_S,
    )
