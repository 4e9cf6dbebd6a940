"""QEMU's networks: -netdev with its device, -nic, and the older -net."""

from __future__ import annotations

from typing import Any

from tetrarch.foreign.carried import CARDS, Carried
from tetrarch.foreign.qemu_lines import QemuLines
from tetrarch.foreign.qemu_words import REPEATED, Option

__all__ = ["QemuNets"]

#: What says nothing of the card that a guest sees.
_PLUMBING = frozenset(
    """addr br bus disable-legacy disable-modern downscript driver id ifname mq netdev queues rombar
    romfile script server server.type type vectors vhost vhostforce vlan
    """.split()  # noqa: SIM905 - a word a line would be a page
)
#: Cards that are no virtio ones begin so.
_OTHER_CARDS = ("vmxnet3", "e1000", "rtl8139", "ne2k", "pcnet", "i8255", "i82551", "tulip", "igb")


class QemuNets:
    def __init__(self, carried: Carried, lines: QemuLines) -> None:
        self._carried = carried
        self._lines = lines
        self._netdevs: dict[str, tuple[dict[str, str], str]] = {}
        self._cards: list[dict[str, str]] = []
        self._backends: list[tuple[dict[str, str], str]] = []
        """Of -net: each goes to the same hub as all cards of it."""

    def option(self, option: Option) -> bool:
        """Whether it is one of these."""
        keys = option.keys("type")
        match option.name:
            case "netdev":
                self._netdevs[keys.get("id", "")] = (keys, str(option))
            case "nic" if keys.get("type") != "none":
                self._take(keys, {}, str(option))
            case "net" if keys.get("type") == "nic":
                self._cards.append(keys)
            case "net" if keys.get("type") != "none":
                self._backends.append((keys, str(option)))
            case _:
                return option.name in ("nic", "net")
        return True

    def device(self, kind: str, keys: dict[str, str], source: str) -> bool:
        if not kind.startswith(("virtio-net", *_OTHER_CARDS)):
            return False
        backend, _ = self._netdevs.pop(keys.get("netdev", ""), (None, ""))
        if backend is None:
            self._carried.lose(source, "its netdev is missing")
        else:
            self._take(backend, {"model": kind, **keys}, source)
        return True

    def finish(self) -> None:
        for index, (keys, source) in enumerate(self._backends):
            self._take(keys, self._cards[index] if index < len(self._cards) else {}, source)
        for _, source in self._netdevs.values():
            self._carried.lose(source, "no device has it")

    def _take(self, backend: dict[str, str], card: dict[str, str], source: str) -> None:
        table = self._backend(backend, source)
        if table is None:
            return
        keys = {**backend, **card}
        model = keys.pop("model", "virtio")
        if model in CARDS and "vhost-user" not in table:
            table["model"] = CARDS[model]
            if table["model"] == "e1000":
                table.pop("queues", None)
        elif model.startswith(_OTHER_CARDS):
            self._carried.lose(f"{source}: {model}", "it is a virtio card")
        for name, option in (("mac", "mac"), ("macaddr", "mac"), ("host_mtu", "mtu")):
            if (value := keys.pop(name, None)) is not None:
                table[option] = value
        self._carried.add("net", table, source)
        left = {key: value for key, value in keys.items() if key not in _PLUMBING}
        self._carried.lose_keys(source, left)

    def _backend(self, keys: dict[str, str], source: str) -> dict[str, Any] | None:
        """What is behind the card, as our table; its keys are taken out."""
        kind = keys.pop("type", "")
        match kind:
            case "user":
                forward = self._forwards(keys, source)
                return {"user": True, "forward": forward} if forward else {"user": True}
            case "tap" if "ifname" in keys:
                table: dict[str, Any] = {"tap": keys["ifname"]}
                if "queues" in keys:
                    table["queues"] = keys["queues"]
                return table
            case "tap" | "bridge":
                self._carried.lose(source, "its tap has no name: net = 'tap=NAME,bridge=NAME'")
            case "stream" if keys.get("addr.type") == "unix":
                keys.pop("addr.type")
                return {"socket": keys.pop("addr.path", "")}
            case "vhost-user" if (path := self._lines.socket(keys.pop("chardev", ""))) is not None:
                return {"vhost-user": path}
            case _:
                self._carried.lose(source, f"there is no network {kind}".strip())
        return None

    def _forwards(self, keys: dict[str, str], source: str) -> list[str]:
        """hostfwd=[tcp|udp]:[hostaddr]:hostport-[guestaddr]:guestport"""
        found = []
        # A list in JSON has keys hostfwd.0.str and so on.
        names = [name for name in keys if name.partition(".")[0] == "hostfwd"]
        for text in (text for name in names for text in keys.pop(name).split(REPEATED)):
            outside, dash, inside = text.partition("-")
            protocol, _, outside = outside.partition(":")
            host, _, port = outside.rpartition(":")
            guest = inside.rpartition(":")[2]
            if not dash or protocol not in ("", "tcp"):
                self._carried.lose(f"{source}: hostfwd={text}", "only TCP is forwarded")
            else:
                # An address that is left out is all of the host's.
                found.append(f"{host or '0.0.0.0'}:{port}:{guest}")
        return found
