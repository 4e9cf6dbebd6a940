"""Options of ``tetrarch run`` for cloud-init in the guest: a disk that tells it what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tetrarch._files import ScratchDirectory
from tetrarch.block.spec import DiskSpec
from tetrarch.errors import ConfigError
from tetrarch.machine.config import MachineConfig

if TYPE_CHECKING:
    from tetrarch.cli.options import CommandOptions

__all__ = ["with_seed"]


@contextmanager
def with_seed(
    config: MachineConfig, options: CommandOptions, place: Path | None = None
) -> Iterator[MachineConfig]:
    """``config`` with one more disk, if any of the options asks for it, until the block ends.

    It lies in ``place``, which others see to if this process is killed.

    Where nothing else names a kernel, the default guest's boots the system on the first disk.
    """
    if not (options.user or options.ssh_key or options.hostname or options.run):
        yield config
        return
    from tetrarch.images.names import public_keys
    from tetrarch.images.seed import Seed

    if not config.disk:
        raise ConfigError(
            "--user, --ssh-key, --hostname and --run are for a disk with cloud-init",
            mend="give it with --disk, or name a disk of image build",
        )
    keys = public_keys(list(options.ssh_key) or None)
    seed = Seed(options.user, keys, options.hostname, options.run)
    with ScratchDirectory(prefix="tetrarch-", dir=place) as folder:
        path = Path(folder) / "cidata.iso"
        path.write_bytes(seed.image())
        disks = (*config.disk, DiskSpec(path, format="raw", readonly=True))
        changes: dict[str, Any] = {"disk": disks}
        words = config.append_extra.split()
        named = any(word.startswith("root=") for word in words)
        if config.kernel is None and config.append is None and not named:
            changes["append_extra"] = " ".join(["root=auto", *words])
        yield config.model_copy(update=changes)
