"""An image as distributions make them for clouds: qcow2, in partitions, with cloud-init in it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tetrarch import block
from tetrarch.images.debian_disk import DebianRecipe, build_debian_disk
from tetrarch.images.progress import Reporter
from tetrarch.images.store import DiskStore

# Without a network cloud-init waits for one for two minutes.
LIMIT_S = 900

pytestmark = [pytest.mark.long, pytest.mark.timeout(3 * LIMIT_S)]


@pytest.mark.usefixtures("disk_programs")
def test_first_boot_makes_the_user_and_runs_the_commands(tmp_path: Path) -> None:
    key = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    recipe = DebianRecipe("cloud", 3 << 30, "image", packages=["cloud-init"])
    store = DiskStore(tmp_path / "disks")
    built = build_debian_disk(recipe, store, Reporter())
    image = tmp_path / "cloud.qcow2"
    block.convert(built.disk, image)
    commands = "id ann; hostname; cat /home/ann/.ssh/authorized_keys; poweroff"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "tetrarch", "run", "--engine", "bt", "--memory", "1G"),
            *("--disk", image, "--user", "ann", "--hostname", "box", "--ssh-key", f"{key}.pub"),
            *("--run", f"({commands}) >/dev/ttyS0 2>&1"),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    said = done.stdout.replace("\r", "")
    assert (done.returncode, done.stderr) == (0, "tetrarch: engine bt (as asked)\n"), said
    assert "uid=1000(ann)" in said, said
    assert "\nbox\n" in said, said
    assert key.with_suffix(".pub").read_text().split()[1] in said, said
