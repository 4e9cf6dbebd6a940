"""What cloud-init in a guest is to set up at its first boot: the NoCloud data source.

A disk labelled CIDATA has two files, ``user-data`` and ``meta-data``
(cloudinit.readthedocs.io, "NoCloud"). Both are YAML, of which JSON is a part.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tetrarch.images.iso9660 import iso_image

__all__ = ["Seed"]

_LABEL = "CIDATA"
_NAMESPACE = uuid.UUID("0d6f64a8-7f0c-4a52-8a4b-0f7f4f5d8f0e")


@dataclass(frozen=True)
class Seed:
    """``ssh_keys`` are lines as in authorized_keys(5), ``commands`` are a shell's."""

    user: str = ""
    ssh_keys: Sequence[str] = ()
    hostname: str = ""
    commands: Sequence[str] = ()

    def user_data(self) -> str:
        config: dict[str, Any] = {}
        if self.hostname:
            config |= {"hostname": self.hostname, "preserve_hostname": False}
        if self.user:
            config["users"] = [
                {
                    "name": self.user,
                    "shell": "/bin/bash",
                    "sudo": "ALL=(ALL) NOPASSWD:ALL",
                    "lock_passwd": True,
                    "ssh_authorized_keys": list(self.ssh_keys),
                }
            ]
        elif self.ssh_keys:
            # Of the user that the image has for it.
            config["ssh_authorized_keys"] = list(self.ssh_keys)
        if self.commands:
            config["runcmd"] = list(self.commands)
        return "#cloud-config\n" + json.dumps(config, indent=2) + "\n"

    def meta_data(self) -> str:
        """cloud-init does its work once for an instance: other data are another."""
        identity = uuid.uuid5(_NAMESPACE, self.user_data())
        values = {"instance-id": f"tetrarch-{identity}"}
        if self.hostname:
            values["local-hostname"] = self.hostname
        return json.dumps(values, indent=2) + "\n"

    def image(self) -> bytes:
        """The disk."""
        files = {"meta-data": self.meta_data().encode(), "user-data": self.user_data().encode()}
        return iso_image(files, _LABEL)
