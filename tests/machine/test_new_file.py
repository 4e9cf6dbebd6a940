"""A file that is written, and a process that is killed meanwhile."""

import subprocess
import sys
from pathlib import Path

from tetrarch.machine.new_file import new_file

WRITES = """
import sys
from pathlib import Path
from tetrarch.machine.new_file import new_file
with new_file(Path(sys.argv[1]), "write") as file:
    file.write(b"half")
    print("begun", flush=True)
    sys.stdin.read()
"""


def writer(path: Path) -> subprocess.Popen[str]:
    """A process that is in the midst of a file, and has it whole when its input ends."""
    words = [sys.executable, "-c", WRITES, str(path)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_half_of_a_file_goes_with_the_next_one(tmp_path: Path) -> None:
    (tmp_path / ".tetrarch-notes").touch()
    with writer(tmp_path / "killed") as killed, writer(tmp_path / "living") as living:
        assert len(names(tmp_path)) == 3
        killed.kill()
        killed.wait()
        with new_file(tmp_path / "own", "write") as file:
            file.write(b"all")
            assert len(names(tmp_path)) == 3, "what the dead one left is gone"
        living.communicate()
    assert names(tmp_path) == [".tetrarch-notes", "living", "own"]
    assert (tmp_path / "living").read_bytes() == b"half"
