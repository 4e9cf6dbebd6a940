"""QEMU's character devices: serial lines, the ports of virtio consoles, and directories."""

from __future__ import annotations

from tetrarch.foreign.carried import Carried
from tetrarch.foreign.qemu_words import Option

__all__ = ["QemuLines"]

_PORTS = ("virtconsole", "virtserialport")


class QemuLines:
    def __init__(self, carried: Carried) -> None:
        self._carried = carried
        self._chardevs: dict[str, dict[str, str]] = {}
        self._serial = 0
        self._fsdevs: dict[str, dict[str, str]] = {}

    def option(self, option: Option) -> bool:
        """Whether it is one of these."""
        match option.name:
            case "chardev":
                keys = option.keys("backend")
                self._chardevs[keys.get("id", "")] = keys
            case "serial":
                self._line(option)
            case "fsdev":
                keys = option.keys("fsdriver")
                self._fsdevs[keys.get("id", "")] = keys
            case "virtfs":
                self._share(option.keys("fsdriver"), str(option))
            case _:
                return False
        return True

    def device(self, kind: str, keys: dict[str, str], source: str) -> bool:
        if kind in _PORTS:
            name = keys.get("name", "")
            text = self._console_of(keys.get("chardev", ""))
            if text is None:
                self._carried.lose(source, "its chardev is no file, and no socket that listens")
            else:
                self._carried.add("virtio_console", f"{text},name={name}" if name else text, source)
        elif kind == "isa-serial":
            self._line(Option("serial", f"chardev:{keys.get('chardev', '')}"))
        elif kind.startswith("virtio-9p"):
            found = self._fsdevs.get(keys.get("fsdev", ""))
            self._share({**(found or {}), "mount_tag": keys.get("mount_tag", "")}, source)
        else:
            return False
        return True

    def socket(self, chardev: str) -> str | None:
        """The path of one that connects to somebody's socket: a vhost-user back end's."""
        keys = self._chardevs.get(chardev, {})
        if keys.get("backend") != "socket" or _on(keys.get("server", "off")):
            return None
        return keys.get("path", keys.get("addr.data.path"))

    def _line(self, option: Option) -> None:
        text = self._console(option.value or "")
        self._serial += 1
        if self._serial > 1:
            if text != "none":
                self._carried.lose(str(option), "there is one serial line")
        elif text is None:
            self._carried.lose(str(option), "it can be a file, or a socket that listens")
        else:
            self._carried.set("console", text, str(option))

    def _console(self, value: str) -> str | None:
        """As -serial has it, as ours."""
        kind, _, rest = value.partition(":")
        match kind:
            case "mon":
                return self._console(rest)
            case "none" | "null":
                return "none"
            case "stdio":
                return "stdio"
            case "file":
                return f"file={rest}"
            case "unix":
                path, *words = rest.split(",")
                server = any(word in ("server", "server=on") for word in words)
                return f"socket={path}" if server else None
            case "chardev":
                return self._console_of(rest)
        return None

    def _console_of(self, chardev: str) -> str | None:
        keys = self._chardevs.get(chardev, {})
        match keys.get("backend"):
            case "stdio":
                return "stdio"
            case "null":
                return "none"
            case "file":
                return f"file={keys.get('path', '')}"
            case "socket" if "path" in keys and _on(keys.get("server", "off")):
                return f"socket={keys['path']}"
        return None

    def _share(self, keys: dict[str, str], source: str) -> None:
        if keys.get("fsdriver") != "local" or "path" not in keys:
            self._carried.lose(source, "only directories are shared")
            return
        table: dict[str, str | bool] = {"directory": keys["path"]}
        if tag := keys.get("mount_tag"):
            table["tag"] = tag
        if _on(keys.get("readonly", "off")):
            table["readonly"] = True
        self._carried.add("share", table, source)
        self._carried.lose(f"{source}: 9p", "it is shared by virtiofs")


def _on(value: str) -> bool:
    return value in ("on", "yes", "true", "y")
