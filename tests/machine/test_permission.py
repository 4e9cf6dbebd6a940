"""What grants a device to a user, by its owner, group, mode and access list."""

from __future__ import annotations

import grp
import shutil
import stat

import pytest

from tetrarch.machine.permission import Node, User, mend

KVM_GROUP = 104
DISK_GROUP = 6
USER = User(1000, "ann", frozenset({1000}), frozenset({1000}))


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A host with the group kvm and with setfacl."""

    def by_name(name: str) -> grp.struct_group:
        assert name == "kvm"
        return grp.struct_group(("kvm", "x", KVM_GROUP, []))

    monkeypatch.setattr(grp, "getgrnam", by_name)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    return monkeypatch


def node(mode: int, gid: int, *acl: tuple[int, int, int], uid: int = 0) -> Node:
    return Node("/dev/kvm", uid, gid, stat.S_IFCHR | mode, acl)


def test_device_as_udev_makes_it_needs_its_group() -> None:
    assert mend(node(0o660, KVM_GROUP), USER) == (
        "sudo usermod -aG kvm ann, then log in anew, for the group kvm"
    )


def test_group_that_the_session_does_not_have_yet_needs_a_new_session() -> None:
    joined = User(1000, "ann", frozenset({1000}), frozenset({1000, KVM_GROUP}))
    assert mend(node(0o660, KVM_GROUP), joined) == "log in anew, for the group kvm"


@pytest.mark.parametrize("gid", [0, DISK_GROUP])
def test_group_with_other_rights_is_never_joined(gid: int) -> None:
    for mode in (0o600, 0o660):
        text = mend(node(mode, gid), USER)
        assert text.startswith("sudo setfacl -m u:ann:rw /dev/kvm; or")
        assert "sudo chgrp kvm /dev/kvm && sudo chmod 660 /dev/kvm" in text
        assert text.count("usermod -aG") == text.count("usermod -aG kvm ann") == 1


def test_closed_mode_is_opened_for_the_group() -> None:
    member = User(1000, "ann", frozenset({1000, KVM_GROUP}))
    text = mend(node(0o600, KVM_GROUP), member)
    assert text.endswith("for the group kvm: sudo chmod 660 /dev/kvm")


def test_host_without_the_group_gets_an_entry_in_the_access_list(
    host: pytest.MonkeyPatch,
) -> None:
    def none(name: str) -> grp.struct_group:
        raise KeyError(name)

    host.setattr(grp, "getgrnam", none)
    host.setattr(shutil, "which", lambda name: None)
    assert mend(node(0o600, 0), USER) == ("sudo setfacl -m u:ann:rw /dev/kvm (of the package acl)")


def test_owner_changes_the_mode() -> None:
    assert mend(node(0o400, 0, uid=1000), USER) == "chmod u+rw /dev/kvm"


def test_entry_for_the_user_comes_before_the_group() -> None:
    # user::rw-, user:ann:r--, group::rw-, mask::rw-, other::---
    acl = ((1, 6, 0), (2, 4, 1000), (4, 6, 0), (16, 6, 0), (32, 0, 0))
    assert mend(node(0o660, KVM_GROUP, *acl), USER) == "sudo setfacl -m u:ann:rw /dev/kvm"


def test_mode_under_an_access_list_shows_the_mask_not_the_group() -> None:
    # user::rw-, user:bob:rw-, group::---, mask::rw-, other::---: shown as crw-rw----+
    acl = ((1, 6, 0), (2, 6, 1001), (4, 0, 0), (16, 6, 0), (32, 0, 0))
    seen = node(0o660, KVM_GROUP, *acl)
    assert seen.group_bits == 0
    assert "chmod 660" in mend(seen, USER)


def test_root_is_refused_by_no_file_mode() -> None:
    assert "--device /dev/kvm" in mend(node(0o600, 0), User(0, "root", frozenset({0})))
