"""A short run of the Python fuzz targets, the same each time, and all past findings."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.fuzz import steering
from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parent / "corpus"
COUNTS = {
    "kernel": 1500,
    "options": 3000,
    "archive": 1500,
    "modules": 3000,
    "command_line": 150,
    "saved": 300,
    "ports": 300,
    "functions": 200,
    "vmci": 300,
    "config_file": 600,
    "qemu": 600,
    "firecracker": 600,
    "libvirt": 1200,
    "ovf": 1200,
    "ova": 150,
    "vmx": 1200,
    "qmp": 150,
    "gdb": 400,
    "vnc": 200,
    "recording": 40,
    "backdoor": 1500,
    "svga": 100,
    "hypercalls": 150,
}


@pytest.fixture(scope="module", autouse=True)
def no_machine_is_left() -> Iterator[None]:
    yield
    if steering.life.cache_info().currsize:
        steering.life().close()
        steering.life.cache_clear()


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*.bin")), ids=lambda path: path.stem)
def test_findings_stay_fixed(path: Path) -> None:
    TARGETS[path.stem.partition("-")[0]](path.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
def test_random_input(name: str) -> None:
    chance = random.Random(1)
    for _ in range(COUNTS[name]):
        data = chance.randbytes(chance.randrange(400))
        try:
            TARGETS[name](data)
        except Exception:
            print(f"{name}: {data!r}")
            raise
