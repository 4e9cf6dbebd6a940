"""A Firecracker microVM's configuration file (--config-file), as a configuration of ours.

The file is a JSON object with the bodies of the API's requests; their fields are those of
Firecracker's API description, src/firecracker/swagger/firecracker.yaml.
"""

from __future__ import annotations

import json
from typing import Any

from tetrarch.errors import ConfigError
from tetrarch.foreign.carried import Carried

__all__ = ["import_firecracker"]

#: Of what Firecracker gives a kernel that has no boot_args: what says how it ends. The rest saves
#: time, or takes the serial line away.
_BOOT_ARGS = "reboot=k panic=1"


def import_firecracker(text: str) -> Carried:
    """Raises ConfigError for what is no such file."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        mend = "name a file for --config-file"
        raise ConfigError(f"this is no JSON: {error}", mend=mend) from error
    if not isinstance(values, dict):
        raise ConfigError("this is JSON, but no object", mend="name a file for --config-file")
    return _Reader(values).carried


class _Reader:
    def __init__(self, values: dict[str, Any]) -> None:
        self.carried = Carried()
        # Firecracker's devices are on pages of memory by default.
        self.carried.set("virtio", "mmio", "Firecracker")
        # There a guest's reset is the end, and the way to power off.
        self.carried.set("on_reset", "end", "Firecracker")
        self._root = ""
        boot = self._object(values, "boot-source")
        self._machine(self._object(values, "machine-config"))
        drives = self._list(values, "drives")
        # The kernel's first disk is the one with its root.
        for drive in sorted(drives, key=lambda drive: drive.get("is_root_device") is not True):
            self._drive(drive)
        for interface in self._list(values, "network-interfaces"):
            self._interface(interface)
        self._boot(boot)
        self._few(values)
        for name, value in values.items():
            if value not in (None, {}, []):
                self.carried.lose(name, "there is nothing like it")

    def _object(self, values: dict[str, Any], name: str) -> dict[str, Any]:
        value = values.pop(name, None)
        if value is not None and not isinstance(value, dict):
            self.carried.lose(name, "it is no object")
        return value if isinstance(value, dict) else {}

    def _list(self, values: dict[str, Any], name: str) -> list[dict[str, Any]]:
        value = values.pop(name, None)
        if value is not None and not isinstance(value, list):
            self.carried.lose(name, "it is no list")
        several = value if isinstance(value, list) else []
        for one in several:
            if not isinstance(one, dict):
                self.carried.lose(f"{name}: {one}", "it is no object")
        return [one for one in several if isinstance(one, dict)]

    def _boot(self, boot: dict[str, Any]) -> None:
        if (kernel := boot.pop("kernel_image_path", None)) is not None:
            self.carried.set("kernel", kernel, "kernel_image_path")
        if (initrd := boot.pop("initrd_path", None)) is not None:
            self.carried.set("initrd", initrd, "initrd_path")
        words = boot.pop("boot_args", None)
        if kernel is not None:
            source = "Firecracker's default" if words is None else "boot_args"
            words = _BOOT_ARGS if words is None else words
            text = f"{words} {self._root}".strip() if isinstance(words, str) else words
            self.carried.set("append", text, source)
        self.carried.lose_keys("boot-source", boot)

    def _machine(self, machine: dict[str, Any]) -> None:
        # The defaults are Firecracker's.
        memory = machine.pop("mem_size_mib", 128)
        self.carried.set("memory", memory, "mem_size_mib")
        self.carried.set("cpus", machine.pop("vcpu_count", 1), "vcpu_count")
        for name in ("smt", "track_dirty_pages"):
            if machine.get(name) is False:
                del machine[name]
        for name in ("cpu_template", "huge_pages"):
            if machine.get(name) in (None, "None"):
                machine.pop(name, None)
        self.carried.lose_keys("machine-config", machine)

    def _drive(self, drive: dict[str, Any]) -> None:
        name = f"drive {drive.pop('drive_id', '')}".strip()
        root, partition = drive.pop("is_root_device", False), drive.pop("partuuid", None)
        readonly = drive.pop("is_read_only", False) is True
        if (socket := drive.pop("socket", None)) is not None:
            self.carried.add("disk", {"vhost-user": socket}, name)
        else:
            table: dict[str, Any] = {"path": drive.pop("path_on_host", ""), "format": "raw"}
            if readonly:
                table["readonly"] = True
            self.carried.add("disk", table | self._limits(name, drive), name)
        # The kernel's own file is all that Firecracker promises to write at once.
        if drive.get("cache_type") in ("Writeback", "Unsafe"):
            del drive["cache_type"]
        drive.pop("io_engine", None)
        if root is True and not self._root:
            device = f"PARTUUID={partition}" if partition else "/dev/vda"
            self._root = f"root={device} {'ro' if readonly else 'rw'}"
        self.carried.lose_keys(name, drive)

    def _limits(self, name: str, drive: dict[str, Any]) -> dict[str, int]:
        """A token bucket's steady rate; it has no bursts here."""
        limiter = drive.pop("rate_limiter", None)
        found = {}
        for key, option in (("bandwidth", "bps"), ("ops", "iops")):
            rate = _rate(limiter.pop(key, None)) if isinstance(limiter, dict) else None
            if rate is not None:
                found[option] = rate
                self.carried.lose(f"{name}: bursts of {key}", "only the steady rate is a limit")
        if limiter:
            self.carried.lose(f"{name}: rate_limiter")
        return found

    def _interface(self, interface: dict[str, Any]) -> None:
        name = f"interface {interface.pop('iface_id', '')}".strip()
        table: dict[str, Any] = {"tap": interface.pop("host_dev_name", "")}
        for key, option in (("guest_mac", "mac"), ("mtu", "mtu")):
            if (value := interface.pop(key, None)) is not None:
                table[option] = value
        self.carried.add("net", table, name)
        for key, value in interface.items():
            if value is not None:
                self.carried.lose(f"{name}: {key}", "the option net has rate=, the same each way")

    def _few(self, values: dict[str, Any]) -> None:
        """Of what there is one."""
        if vsock := self._object(values, "vsock"):
            self.carried.set("vsock", vsock.pop("uds_path", ""), "vsock")
            # Its only user is the host's kernel, which is not between here.
            vsock.pop("vsock_id", None)
            if vsock.get("guest_cid") == 3:
                del vsock["guest_cid"]
            self.carried.lose_keys("vsock", vsock)
        balloon = self._object(values, "balloon")
        for name in ("deflate_on_oom", "stats_polling_interval_s", "free_page_reporting"):
            balloon.pop(name, None)
        if balloon.get("amount_mib") == 0:
            del balloon["amount_mib"]
        self.carried.lose_keys("balloon", balloon, "a program sets its target")
        entropy = self._object(values, "entropy")
        self.carried.lose_keys("entropy", {k: v for k, v in entropy.items() if v is not None})


def _rate(bucket: object) -> int | None:
    """Tokens a second: ``size`` of them come in ``refill_time`` ms."""
    if not isinstance(bucket, dict):
        return None
    size, refill = bucket.get("size"), bucket.get("refill_time")
    if not isinstance(size, int) or not isinstance(refill, int):
        return None
    if not 0 < size < 1 << 63 or not 0 < refill < 1 << 63:
        return None
    return max(1, size * 1000 // refill)
