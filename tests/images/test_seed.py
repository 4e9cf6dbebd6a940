"""What cloud-init finds: the seed, its disk as a guest sees it, and the options for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tetrarch.errors import ImageError
from tetrarch.images import CachedGuest
from tetrarch.images.iso9660 import iso_image
from tetrarch.images.names import public_keys
from tetrarch.images.seed import Seed

LIMIT_S = 120
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIO/669A/XmITP94PWUgO2E9EobfsryxatoqRrE65XIxs me"


def user_data(seed: Seed) -> dict[str, object]:
    head, _, rest = seed.user_data().partition("\n")
    assert head == "#cloud-config"
    found: dict[str, object] = json.loads(rest)
    return found


def test_seed_says_what_was_asked_for_and_nothing_else() -> None:
    seed = Seed(user="me", ssh_keys=[KEY], hostname="box", commands=['echo "a: b"'])
    data = user_data(seed)
    assert (data["hostname"], data["runcmd"]) == ("box", ['echo "a: b"'])
    assert data["users"] == [
        {
            "name": "me",
            "shell": "/bin/bash",
            "sudo": "ALL=(ALL) NOPASSWD:ALL",
            "lock_passwd": True,
            "ssh_authorized_keys": [KEY],
        }
    ]
    assert json.loads(seed.meta_data())["local-hostname"] == "box"
    # Without a user it is the image's own who may log in.
    assert user_data(Seed(ssh_keys=[KEY])) == {"ssh_authorized_keys": [KEY]}
    assert user_data(Seed()) == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{KEY}\n", None),
        (f'command="a b",no-pty {KEY}', None),
        (KEY.rsplit(" ", 1)[0], None),
        (KEY[:-12], "is no public SSH key"),  # cut
        ("<html> <body>", "is no public SSH key"),
        ("ssh-ed25519 AAAA me", "is no public SSH key"),
        (KEY.replace("ssh-ed25519", "ssh-rsa"), "is no public SSH key"),
        (f"{KEY}\n{KEY}\n", "is no public SSH key"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----\nx", "but a private one; give its .pub file"),
    ],
)
def test_file_is_a_key_or_is_named_as_none(tmp_path: Path, text: str, said: str | None) -> None:
    path = tmp_path / "key.pub"
    path.write_text(text)
    if said is None:
        assert public_keys([path]) == [text.strip()]
    else:
        with pytest.raises(ImageError, match=said) as refused:
            public_keys([path])
        assert str(path) in str(refused.value)


def test_other_data_are_another_instance() -> None:
    def identity(seed: Seed) -> object:
        return json.loads(seed.meta_data())["instance-id"]

    assert identity(Seed(user="me")) == identity(Seed(user="me"))
    assert identity(Seed(user="me")) != identity(Seed(user="you"))
    assert Seed(user="me").image() == Seed(user="me").image()


def test_disk_has_the_label_that_cloud_init_looks_for() -> None:
    image = Seed(user="me").image()
    assert len(image) % 2048 == 0
    # ECMA-119, 8.4.7; Joliet: in Unicode.
    for sector, label in ((16, b"CIDATA"), (17, "CIDATA".encode("utf-16-be"))):
        descriptor = image[sector * 2048 :]
        assert (descriptor[1:6], descriptor[40 : 40 + len(label)]) == (b"CD001", label)


def test_more_files_than_a_directory_holds_are_refused() -> None:
    with pytest.raises(ValueError, match="too many files"):
        iso_image({f"a-file-with-a-long-name-{n}": b"" for n in range(40)}, "X")


def tetrarch(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tetrarch", "run", "--engine", "bt", *map(str, words)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )


def test_guest_reads_the_disk(debian_guest: CachedGuest, tmp_path: Path) -> None:
    """By its names of Unicode, and by those that every reader knows."""
    key = tmp_path / "key.pub"
    key.write_text(f"{KEY}\n")
    (tmp_path / "first").write_bytes(bytes(1 << 20))
    guest = ("--kernel", debian_guest.kernel, "--initrd", debian_guest.initrd)
    seed = ("--user", "me", "--ssh-key", key, "--hostname", "box", "--run", "echo ü")
    script = """
        modprobe isofs; cat /sys/block/vdb/ro
        mount -t iso9660 /dev/vdb /mnt; cd /mnt; ls; cat user-data; cd /; umount /mnt
        mount -t iso9660 -o nojoliet /dev/vdb /mnt; ls /mnt"""
    disk = ("--disk", tmp_path / "first")
    done = tetrarch(*guest, *disk, *seed, "--", "sh", "-c", script)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == ["1", "meta-data", "user-data"]
    assert lines[-2:] == ["meta_data", "user_data"]
    wanted = Seed("me", [KEY], "box", ["echo ü"]).user_data()
    assert "\n".join(lines[3:-2]) + "\n" == wanted


@pytest.mark.parametrize(
    ("words", "said", "code"),
    [
        (["--user", "root;rm"], "--user: 'root;rm' is no user name", 2),
        (["--hostname", "a..b"], "--hostname: 'a..b' is no host name", 2),
        (["--user", "me"], "are for a disk with cloud-init", 2),
        (["--ssh-key", "/nonexistent", "--disk", "{disk}"], "cannot be read", 1),
        (["--ssh-key", "{disk}", "--disk", "{disk}"], "is no public SSH key", 1),
    ],
)
def test_what_no_guest_takes_is_one_line(
    tmp_path: Path, words: list[str], said: str, code: int
) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    done = tetrarch(*(word.format(disk=disk) for word in words))
    assert (done.returncode, done.stderr.count("\n"), done.stdout) == (code, 1, "")
    assert said in done.stderr
