"""``tetrarch config``: what would be run, and who said so."""

import tomllib
from pathlib import Path

import pytest
from tests.cli.conftest import Cli


def remarks(text: str) -> dict[str, str]:
    """Where each value came from; one of several lines ends with ``]``."""
    found, name = {}, ""
    for line in text.splitlines():
        key, equals, _ = line.partition(" = ")
        name = key if equals else name
        if " # " in line:
            found[name] = line.rpartition(" # ")[2]
    return found


def test_each_value_is_there_with_who_said_it(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "m.toml"
    file.write_text(
        'memory = "1G"\nengine = "bt"\ndisk = [\n"a.img",\n"b.img,bus=nvme"]\nname = "file"\n'
        '[run]\ntimeout = 60\nssh_key = "k.pub"\n'
    )
    shown = cli(
        "config",
        *("debian", "--config", file, "--engine", "kvm", "--no-rng", "--json"),
        *("--", "ls", "-l"),
        TETRARCH_NAME="variable",
        TETRARCH_ENGINE="bt",
        TETRARCH_CPUS="2",
    )
    assert (shown.returncode, shown.stderr) == (0, "")
    values = tomllib.loads(shown.stdout)
    assert values["disk"] == [f"{tmp_path}/a.img", f"{tmp_path}/b.img,bus=nvme"]
    assert values["run"]["ssh_key"] == [f"{tmp_path}/k.pub"]
    assert values["run"]["command"] == ["ls", "-l"]
    origins = remarks(shown.stdout)
    assert {name: origins[name] for name in ("memory", "disk", "timeout", "ssh_key")} == {
        "memory": f"{file}:1",
        "disk": f"{file}:3",
        "timeout": f"{file}:8",
        "ssh_key": f"{file}:9",
    }
    assert (values["engine"], origins["engine"]) == ("kvm", "option --engine")
    assert (values["name"], origins["name"]) == ("variable", "environment TETRARCH_NAME")
    assert (values["cpus"], origins["cpus"]) == (2, "environment TETRARCH_CPUS")
    assert (values["rng"], origins["rng"]) == (False, "option --rng")
    assert (values["image"], origins["image"]) == ("debian", "argument")
    assert (values["balloon"], origins["balloon"]) == (True, "default")
    assert (values["run"]["json"], origins["json"]) == (True, "option --json")
    assert "# kernel: none (default)" in shown.stdout

    again = tmp_path / "again.toml"
    again.write_text(shown.stdout)
    assert tomllib.loads(cli("config", "--config", again).stdout) == values
    assert cli("config", TETRARCH_CONFIG=str(again)).stdout.count(f"{again}:") > len(values)


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["--memroy", "1G"], {}, "--memory"),
        ([], {"TETRARCH_MEMORY": "lots"}, "TETRARCH_MEMORY: 'lots' is no size"),
        (["--disk", "a", "--disk", "b,bus=usb"], {}, "--disk: bus is 'usb'"),
        ([], {"TETRARCH_CONFIG": "/nonexistent"}, "/nonexistent: No such file"),
        (["--image", "x"], {"TETRARCH_CONFIG": "/dev/null", "TETRARCH_KERNEL": "y"}, ""),
    ],
)
def test_wrong_option_is_one_line(
    cli: Cli, arguments: list[str], variables: dict[str, str], message: str
) -> None:
    shown = cli("config", *arguments, **variables)
    assert shown.returncode == (2 if message else 0)
    assert len(shown.stderr.splitlines()) == bool(message)
    assert message in shown.stderr


def test_cpu_of_a_model_is_written_as_it_is_read(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "m.toml"
    file.write_text('cpu = "Haswell,-pcid"\n')
    shown = cli("config", "--config", file)
    assert tomllib.loads(shown.stdout)["cpu"] == "Haswell,-pcid"
    again = tmp_path / "again.toml"
    again.write_text(shown.stdout)
    assert (
        remarks(cli("config", "--config", again, "--cpu", "host").stdout)["cpu"] == "option --cpu"
    )
    refused = cli("config", "--cpu", "Haswel")
    assert refused.returncode == 2
    assert refused.stderr == ("tetrarch: --cpu: 'Haswel' is no CPU model; did you mean Haswell?\n")
