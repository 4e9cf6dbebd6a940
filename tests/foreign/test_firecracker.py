"""A Firecracker configuration as one of ours."""

import json
from pathlib import Path
from typing import Any

import pytest

from tetrarch.errors import ConfigError
from tetrarch.foreign import import_firecracker
from tetrarch.machine.config import MachineConfig

CWD = Path("/cwd")
BOOT = {"kernel_image_path": "vmlinux", "boot_args": "console=ttyS0 reboot=k panic=1 pci=off"}


def machine(**values: Any) -> tuple[MachineConfig, list[str]]:
    body = {"boot-source": BOOT} | {name.replace("_", "-"): one for name, one in values.items()}
    carried = import_firecracker(json.dumps(body))
    return carried.finish(CWD), list(map(str, carried.lost))


def test_machine_of_its_getting_started_guide_is_carried_over_whole() -> None:
    config, lost = machine(
        drives=[
            {"drive_id": "data", "path_on_host": "/d", "is_root_device": False},
            {
                "drive_id": "rootfs",
                "path_on_host": "root.ext4",
                "is_root_device": True,
                "is_read_only": True,
                "cache_type": "Unsafe",
                "io_engine": "Sync",
                "partuuid": None,
                "rate_limiter": None,
                "socket": None,
            },
        ],
        machine_config={
            "vcpu_count": 2,
            "mem_size_mib": 1024,
            "smt": False,
            "track_dirty_pages": False,
            "huge_pages": "None",
        },
        network_interfaces=[
            {"iface_id": "net1", "guest_mac": "06:00:AC:10:00:02", "host_dev_name": "tap0"}
        ],
        vsock={"guest_cid": 3, "uds_path": "./v.sock"},
        balloon=None,
        logger=None,
    )
    assert lost == []
    assert (config.kernel, config.cpus.count, config.memory) == (CWD / "vmlinux", 2, 1 << 30)
    assert config.append == f"{BOOT['boot_args']} root=/dev/vda ro"
    assert list(map(str, config.disk)) == ["/cwd/root.ext4,format=raw,readonly=on", "/d,format=raw"]
    assert [str(net) for net in config.net] == ["tap=tap0,mac=06:00:ac:10:00:02"]
    assert (config.vsock, config.virtio) == (CWD / "v.sock", "mmio")


def test_partition_limits_and_sockets() -> None:
    config, lost = machine(
        drives=[
            {
                "drive_id": "r",
                "path_on_host": "/r",
                "is_root_device": True,
                "partuuid": "0eaa91a0-01",
                "rate_limiter": {
                    "bandwidth": {"size": 1000, "refill_time": 100},
                    "ops": {"size": 5, "refill_time": 1000, "one_time_burst": 9},
                },
            },
            {"drive_id": "s", "socket": "/s", "is_root_device": False},
        ]
    )
    assert list(map(str, config.disk)) == ["/r,format=raw,iops=5,bps=10000", "vhost-user=/s"]
    assert config.append == f"{BOOT['boot_args']} root=PARTUUID=0eaa91a0-01 rw"
    assert lost == [
        f"drive r: bursts of {name}: only the steady rate is a limit"
        for name in ("bandwidth", "ops")
    ]


@pytest.mark.parametrize(
    ("values", "lost"),
    [
        ({"mmds_config": {"version": "V2"}}, ["mmds-config: there is nothing like it"]),
        ({"cpu_config": {"msr_modifiers": []}}, ["cpu-config: there is nothing like it"]),
        ({"machine_config": {"smt": True}}, ["machine-config: smt=True"]),
        ({"machine_config": {"mem_size_mib": "x"}}, ["mem_size_mib: 'x' is no size"]),
        ({"machine_config": []}, ["machine-config: it is no object"]),
        ({"drives": {}}, ["drives: it is no list"]),
        ({"drives": [7]}, ["drives: 7: it is no object"]),
        ({"drives": [{"drive_id": "a"}]}, ["drive a: path is empty"]),
        ({"drives": [{"path_on_host": "\ud800"}]}, ["drive: it is no text"]),
        ({"network_interfaces": [{"host_dev_name": {}}]}, ["interface: tap is {}"]),
        (
            {"network_interfaces": [{"host_dev_name": "t", "rx_rate_limiter": {}}]},
            ["interface: rx_rate_limiter: the option net has rate="],
        ),
        ({"balloon": {"amount_mib": 5}}, ["balloon: amount_mib=5: a program sets its target"]),
    ],
)
def test_what_is_lost_is_named(values: dict[str, Any], lost: list[str]) -> None:
    _, named = machine(**values)
    assert len(named) == len(lost)
    assert all(map(str.startswith, named, lost)), named


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "this is no JSON"),
        ("[" * 100_000, "this is no JSON"),
        ("9" * 5000, "this is no JSON"),
        ("7", "no object"),
        ("{}", "nothing is left to run"),
        ('{"boot-source": {"kernel_image_path": 7}}', "nothing is left to run"),
    ],
)
def test_what_cannot_run_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        import_firecracker(text).finish(CWD)
