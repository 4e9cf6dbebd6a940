"""Disks as they are written down."""

from pathlib import Path

import pytest

from tetrarch.block import CdromSpec, DiskSpec
from tetrarch.block.spec import parse_bytes
from tetrarch.errors import ValueProblem


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("disk.img", DiskSpec(Path("disk.img"))),
        ("a,,b.img,readonly", DiskSpec(Path("a,b.img"), readonly=True)),
        ("d,readonly=off,snapshot=on", DiskSpec(Path("d"), snapshot=True)),
        (
            "/x/d.qcow2,format=qcow2,bus=nvme,iops=500,bps=10M,cache=none,werror=stop",
            DiskSpec(
                Path("/x/d.qcow2"),
                format="qcow2",
                bus="nvme",
                iops=500,
                bps=10 << 20,
                cache="none",
                werror="stop",
            ),
        ),
        ("vhost-user=/run/a,,b", DiskSpec(Path("/run/a,b"), vhost_user=True)),
        ("k=v.img,format=raw", DiskSpec(Path("k=v.img"), format="raw")),
    ],
)
def test_disk_is_what_is_written_and_written_as_it_is(text: str, spec: DiskSpec) -> None:
    assert DiskSpec.parse(text) == spec
    assert DiskSpec.parse(str(spec)) == spec


@pytest.mark.parametrize(
    ("text", "cause", "mend"),
    [
        ("", "'' names no image", "write PATH"),
        (",readonly", "',readonly' names no image", "write PATH"),
        ("d\0", "names no image", "write PATH"),
        ("d,", "'' is no option of a disk", "there are format, bus, readonly"),
        ("d,readonyl", "'readonyl' is no option of a disk", "did you mean readonly?"),
        ("d,format=qed", "format is 'qed'", "there are raw, qcow2, vmdk"),
        ("d,format", "format is nothing", "there are raw, qcow2, vmdk"),
        ("d,bus=scsi", "bus is 'scsi'", "there are virtio, nvme, pvscsi, ahci, ide"),
        ("d,snapshot=yes", "snapshot is 'yes'", "write on or off"),
        ("d,iops=0", "iops is '0'", "give a number a second"),
        ("d,bps=fast", "'fast' is no size", "write 8G"),
        ("d,bps", "bps is nothing", "give a number a second"),
        ("d,iops=1,iops=2", "iops is given twice", "give it once"),
        ("vhost-user=", "names no image", "write PATH"),
        ("vhost-user=d,readonly", "a disk by vhost-user has no options", "to its back end"),
        ("d,werror=ignore", "werror is 'ignore'", "there are report, stop"),
    ],
)
def test_what_is_no_disk_is_refused_with_cause_and_mend(text: str, cause: str, mend: str) -> None:
    with pytest.raises(ValueProblem) as problem:
        DiskSpec.parse(text)
    assert cause in problem.value.cause
    assert mend in problem.value.mend


def test_sizes_are_bytes_or_have_a_unit() -> None:
    sizes = ("512", "4K", "8G", "1 TiB", "3mb")
    assert [parse_bytes(text) for text in sizes] == [512, 4096, 8 << 30, 1 << 40, 3 << 20]
    for text in ("", "G", "-1", "1.5G", "1X", "9999999P", "9" * 30):
        with pytest.raises(ValueProblem):
            parse_bytes(text)


def test_disc_is_a_readonly_image_that_is_what_it_is() -> None:
    assert CdromSpec.parse("a,,b.iso,bus=ahci") == CdromSpec(Path("a,b.iso"))
    spec = CdromSpec.parse("a,,b.iso,bus=ide")
    assert spec == CdromSpec(Path("a,b.iso"), bus="ide")
    assert CdromSpec.parse(str(spec)) == spec
    assert spec.disk == DiskSpec(Path("a,b.iso"), format="raw", readonly=True)
    for text, cause in (
        ("", "'' names no image"),
        ("d,bus=virtio", "bus is 'virtio'"),
        ("d,readonly", "'readonly' is no option of a CD-ROM drive"),
    ):
        with pytest.raises(ValueProblem) as problem:
            CdromSpec.parse(text)
        assert cause in problem.value.cause
