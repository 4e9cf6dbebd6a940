"""What a configuration takes, and how it says no."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tetrarch.block import DiskSpec
from tetrarch.console import MemoryConsole
from tetrarch.errors import ConfigError
from tetrarch.machine.config import MachineConfig, MachineOptions, make_config, parse_size
from tetrarch.machine.config_file import load_config
from tetrarch.net import Forward, NetSpec


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512M", 512 << 20),
        ("512m", 512 << 20),
        ("2G", 2 << 30),
        ("512", 512 << 20),
        (512, 512 << 20),
        ("8192K", 8 << 20),
        ("512MiB", 512 << 20),
        (" 64 M ", 64 << 20),
    ],
)
def test_sizes_as_they_are_written(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "M", "-1", "1.5G", "0", "1K", "4097K", "99999T", "12X", True, None, "٣M", b"64"]
)
def test_what_is_no_size_is_refused_with_a_mend(text: object) -> None:
    with pytest.raises(ValueError, match=r";"):
        parse_size(text)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("memory", "lots", "memory: 'lots' is no size; write 512M"),
        ("cpus", 0, "cpus: 0 is no number of CPUs; give 1 or more"),
        ("cpus", "two", "cpus: 'two' is no number"),
        ("cpus", 256, "cpus: 256 CPUs are more than a machine can have; give 255 or less"),
        ("engine", "tcg", "engine: 'tcg' is no engine; there are auto, bt and kvm"),
        ("name", "a/b", "name: 'a/b' is no name"),
        ("kernel", "", "kernel: '' is no file name"),
        ("kernel", 3, "kernel: 3 is no path; name a file, in quotes"),
        ("disk", DiskSpec(Path("x"), iops=-1), "disk: '-1' is no size"),
        ("disk", DiskSpec(Path("a\0b")), "disk: "),
        ("net", NetSpec("user", mtu=-1), "net: mtu is '-1'; give 68 to 65535"),
        ("net", NetSpec("user", mac=b"\1" * 6), "net: 01:01:01:01:01:01 is no address"),
        ("net", NetSpec("user", delay=float("nan")), "net: delay is "),
        ("net", NetSpec("user", forward=(Forward("::", 1 << 16, 22),)), "net: forward is "),
        ("net", NetSpec("tap", "a" * 16), "net: tap is 'aaaaaaaaaaaaaaaa', which names no"),
        ("kernel", "a\0b", "kernel: "),
        ("append", "a\0b", "append: it holds a zero byte"),
        ("debug_exit", "perhaps", "debug_exit: 'perhaps' is neither"),
        ("memroy", "1G", "memroy: there is no such option; did you mean memory?"),
        ("xyz", "x", "xyz: there is no such option; there are engine, platform, image"),
        ("console", "tape", "console: 'tape' is no console; there are stdio"),
        ("disk", "d,format=qed", "disk: format is 'qed'; there are raw, qcow2, vmdk"),
        ("disk", ["d", 7], "disk: 7 is no disk; write PATH"),
        ("cdrom", 7, "cdrom: 7 is no CD-ROM; write PATH"),
        ("cdrom", "d,bus=nvme", "cdrom: bus is 'nvme'; there are"),
    ],
)
def test_refusal_is_one_line_that_names_the_option(
    option: str, value: object, message: str
) -> None:
    with pytest.raises(ConfigError) as raised:
        make_config({option: value})
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


@given(st.text())
def test_any_text_as_memory_is_a_size_or_a_config_error(text: str) -> None:
    try:
        config = make_config({"memory": text})
    except ConfigError as error:
        assert len(str(error).splitlines()) <= 1  # noqa: PT017
    else:
        assert config.memory % 4096 == 0


def test_options_that_a_type_checker_sees_are_those_there_are() -> None:
    # console= takes an object too, so it is a parameter of its own.
    seen = set(MachineOptions.__annotations__) | {"console", "platform"}
    assert seen == set(MachineConfig.model_fields)


def test_every_option_says_what_it_is() -> None:
    assert all(field.description for field in MachineConfig.model_fields.values())


def test_file_gives_options_with_paths_relative_to_it(tmp_path: Path) -> None:
    file = tmp_path / "machine.toml"
    file.write_text(
        'kernel = "boot/vmlinuz"\nmemory = "1G"\nconsole = "file=log"\n'
        'disk = ["a.img,readonly", "/b.img"]\ncdrom = "c.iso"\n[run]\ntimeout = 3\n'
    )
    config = load_config(file)
    assert config.kernel == tmp_path / "boot" / "vmlinuz"
    assert config.memory == 1 << 30
    assert str(config.console) == f"file={tmp_path / 'log'}"
    assert list(map(str, config.disk)) == [f"{tmp_path / 'a.img'},readonly=on", "/b.img"]
    assert list(map(str, config.cdrom)) == [str(tmp_path / "c.iso")]
    assert config.cpus.count == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("memroy = 3", "memroy: there is no such option; did you mean memory?"),
        ("memory = ", "is no TOML file"),
        ("name = " + "[" * 3000, "is no TOML file"),
        ("run = 3", "run: it is no table"),
        ('image = "debian"\nkernel = "x"', "image and kernel both name a kernel"),
        (None, "No such file"),
    ],
)
def test_file_that_is_wrong_is_named(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "machine.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load_config(file)
    assert str(raised.value).startswith(str(file))
    assert message in str(raised.value)


def test_changed_options_are_checked_alone_and_together() -> None:
    config = make_config({"image": "debian", "memory": "1G"})
    assert config.updated({"cpus": "2"}).memory == 1 << 30
    with pytest.raises(ConfigError, match="image and kernel both"):
        config.updated({"kernel": "x"})
    with pytest.raises(ConfigError, match="--cpus: 'two' is no number"):
        config.updated({"cpus": "two"}, lambda name, item: f"--{name}: ")


def test_ports_of_the_virtio_console_as_they_are_written() -> None:
    terminal = MemoryConsole()
    config = make_config(
        {"virtio_console": ["stdio", "socket=/run/x,y,name=org.example.0", terminal]}
    )
    assert [(str(port.console), port.name) for port in config.virtio_console] == [
        ("stdio", ""),
        ("socket=/run/x,y", "org.example.0"),
        (str(terminal), ""),
    ]
    for wrong in ("stdio,name=", "nowhere", "stdio,name=a/b", 7, ["file="]):
        with pytest.raises(ConfigError, match="virtio_console: "):
            make_config({"virtio_console": wrong})
    with pytest.raises(ConfigError, match="two consoles cannot share stdio"):
        make_config({"virtio_console": "stdio", "console": "stdio"})
