"""Fuzzes one target of tests/fuzz/targets.py for a while.

    python fuzz/python/run.py kernel -max_total_time=600 corpus/

With atheris installed this is libFuzzer with coverage, and takes its options;
without it, random inputs until the time is over.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "src")]
DEFAULT_S = 60


def main() -> None:
    if len(sys.argv) < 2:
        sys.exit(f"usage: {sys.argv[0]} TARGET [-max_total_time=SECONDS] [CORPUS]")
    name = sys.argv.pop(1)
    try:
        import atheris
    except ImportError:
        blind(name)
        return
    # Only our own code: the libraries' branches would drown it.
    with atheris.instrument_imports(include=["tetrarch"]):
        from tests.fuzz.targets import TARGETS
    atheris.Setup(sys.argv, TARGETS[name])
    atheris.Fuzz()


def blind(name: str) -> None:
    from tests.fuzz.targets import TARGETS

    option = next((a for a in sys.argv if a.startswith("-max_total_time=")), None)
    end = time.monotonic() + (float(option.partition("=")[2]) if option else DEFAULT_S)
    count = 0
    while time.monotonic() < end:
        data = random.randbytes(random.randrange(1024))
        count += 1
        try:
            TARGETS[name](data)
        except Exception:
            path = Path(f"crash-{name}-{count}.bin")
            path.write_bytes(data)
            print(f"the input is in {path}", file=sys.stderr)
            raise
    print(f"{name}: {count} inputs")


if __name__ == "__main__":
    main()
