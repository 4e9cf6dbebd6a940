"""Which engine a machine gets, by what the host offers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tetrarch import _native
from tetrarch.errors import HostError
from tetrarch.machine import kvm, selection
from tetrarch.machine.kvm import KvmProbe, Unusable

BROKEN = Unusable("no permission to open /dev/kvm", "join its group")


def probe(reason: Unusable | None = None, *, hardware: bool = True) -> KvmProbe:
    rate = 3e9 if hardware else 2e6
    return KvmProbe(
        reason,
        hardware=hardware and reason is None,
        guest_rate=0 if reason else rate,
        host_rate=3e9,
        max_vcpus=8,
        nested=False,
        seconds=0.01,
    )


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A host on which both engines work; a test changes it."""
    monkeypatch.setattr(selection, "probe_kvm", probe)
    monkeypatch.setattr(_native, "engine_available", lambda name: None)
    monkeypatch.setattr(kvm, "DEVICE", "/nonexistent/kvm")
    return monkeypatch


def test_auto_takes_kvm_where_hardware_is_behind_it(host: pytest.MonkeyPatch) -> None:
    assert selection.choose("auto") == ("kvm", "the best of this host")


def test_auto_takes_bt_where_kvm_crawls_and_says_so(host: pytest.MonkeyPatch) -> None:
    host.setattr(selection, "probe_kvm", lambda: probe(hardware=False))
    name, why = selection.choose("auto")
    assert name == "bt"
    assert "slower than bt" in why
    assert "2.0 million instructions a second" in why


def test_kvm_that_crawls_is_taken_when_asked_for_and_is_said_to_crawl(
    host: pytest.MonkeyPatch,
) -> None:
    host.setattr(selection, "probe_kvm", lambda: probe(hardware=False))
    name, why = selection.choose("kvm")
    assert name == "kvm"
    assert "1/1,500 of the CPU; engine bt is faster" in why
    (info,) = (info for info in selection.engines() if info.name == "kvm")
    assert (info.available, info.slow) == (True, True)


def test_kvm_whose_guests_do_not_run_is_refused_when_asked_for(host: pytest.MonkeyPatch) -> None:
    dead = Unusable("a small guest did not run", "use engine bt")
    host.setattr(selection, "probe_kvm", lambda: probe(dead))
    with pytest.raises(HostError, match="a small guest did not run"):
        selection.choose("kvm")


def test_auto_takes_bt_where_kvm_cannot_be_opened(host: pytest.MonkeyPatch) -> None:
    host.setattr(selection, "probe_kvm", lambda: probe(BROKEN))
    assert selection.choose("auto") == (
        "bt",
        "not kvm: no permission to open /dev/kvm; see tetrarch doctor",
    )


def test_auto_takes_any_kvm_for_more_cpus_than_bt_runs(host: pytest.MonkeyPatch) -> None:
    host.setattr(selection, "probe_kvm", lambda: probe(hardware=False))
    assert selection.choose("auto", cpus=100)[0] == "kvm"


def test_more_cpus_than_bt_runs_are_refused_without_kvm(host: pytest.MonkeyPatch) -> None:
    host.setattr(selection, "probe_kvm", lambda: probe(BROKEN))
    with pytest.raises(HostError, match=r"100 CPUs need engine kvm.*ask for 64 at most"):
        selection.choose("auto", cpus=100)
    with pytest.raises(HostError, match="engine bt runs 64 CPUs at most, not 100"):
        selection.choose("bt", cpus=100)


def test_auto_takes_bt_for_several_cpus(host: pytest.MonkeyPatch) -> None:
    host.setattr(selection, "probe_kvm", lambda: probe(BROKEN))
    assert selection.choose("auto", cpus=64)[0] == "bt"


def test_asked_for_engine_that_cannot_run_names_the_other(host: pytest.MonkeyPatch) -> None:
    host.setattr(_native, "engine_available", lambda name: BROKEN if name == "kvm" else None)
    with pytest.raises(
        HostError, match=r"engine kvm cannot be used: .*; join its group; or use engine bt"
    ):
        selection.choose("kvm")


def test_no_engine_at_all_is_an_error(host: pytest.MonkeyPatch) -> None:
    host.setattr(selection, "probe_kvm", lambda: probe(BROKEN))
    host.setattr(_native, "engine_available", lambda name: ("broken", "mend it"))
    with pytest.raises(
        HostError,
        match=r"no engine can run on this host \(kvm: .*; bt: broken\); .*for bt: mend it",
    ):
        selection.choose("auto")


def test_missing_capabilities_are_named_with_what_is_lost(host: pytest.MonkeyPatch) -> None:
    found = [("KVM_CAP_A", True, "nothing"), ("KVM_CAP_B", False, "something")]
    host.setattr(_native, "kvm_capabilities", lambda: found)
    (info,) = (info for info in selection.engines() if info.name == "kvm")
    assert [(lack.name, lack.lost) for lack in info.lacks] == [("KVM_CAP_B", "something")]


class Counted:
    """Stands for the probe in the kernel."""

    def __init__(self, reason: tuple[str, str] | None) -> None:
        self.runs = 0
        self._reason = reason

    def __call__(self, device: str) -> _native.KvmProbe:
        self.runs += 1
        return {
            "reason": self._reason,
            "runs": self._reason is None,
            "hardware": self._reason is None,
            "guest_rate": 1e9,
            "host_rate": 1e9,
            "max_vcpus": 8,
            "nested": False,
            "seconds": 0.01,
        }


@pytest.fixture
def device(host: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    node = tmp_path / "kvm"
    node.touch()
    host.setattr(kvm, "DEVICE", str(node))
    host.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return node


def test_result_is_kept_for_this_boot_and_device(host: pytest.MonkeyPatch, device: Path) -> None:
    counted = Counted(None)
    host.setattr(_native, "kvm_probe", counted)
    first = kvm.probe_kvm()
    assert kvm.probe_kvm() == first
    assert counted.runs == 1
    kvm.probe_kvm(fresh=True)
    assert counted.runs == 2
    # The node is made anew with its module, which may be another one.
    device.rename(device.with_name("old"))
    device.touch()
    kvm.probe_kvm()
    assert counted.runs == 3


def test_failure_is_not_kept(host: pytest.MonkeyPatch, device: Path) -> None:
    counted = Counted(("no permission", "ask"))
    host.setattr(_native, "kvm_probe", counted)
    kvm.probe_kvm()
    kvm.probe_kvm()
    assert counted.runs == 2


def test_damaged_file_is_measured_anew(host: pytest.MonkeyPatch, device: Path) -> None:
    counted = Counted(None)
    host.setattr(_native, "kvm_probe", counted)
    kvm.probe_kvm()
    kept = device.parent / "tetrarch" / "kvm-probe.json"
    for damage in ("", "[]", "{", '{"key": 1}'):
        kept.write_text(damage)
        assert kvm.probe_kvm().hardware
    assert counted.runs == 5
