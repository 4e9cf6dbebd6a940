"""For tests of machines and devices: kernels of a few bytes, and machines without a CPU."""

from tetrarch.testing.kernels import pvh_kernel
from tetrarch.testing.scripted import ScriptedVcpu, ScriptedVm

__all__ = ["ScriptedVcpu", "ScriptedVm", "pvh_kernel"]
