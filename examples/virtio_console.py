"""A virtio console whose other end is Python: it answers each line in upper case.

    python examples/virtio_console.py

boots the default guest, which finds the console as /dev/hvc0 by its own driver.
"""

from __future__ import annotations

from collections import deque

from tetrarch import Machine
from tetrarch._native import VirtioChain
from tetrarch.virtio import DeviceQueues

# Virtio 1.2, 5.3.2: queues of the first port.
RECEIVE, TRANSMIT = 0, 1


class ShoutingConsole:
    device_id = 3
    features = 0
    queue_sizes = (64, 64)
    config = b""
    #: The driver gives buffers here for what we have to say, whenever that is.
    inputs = (RECEIVE,)

    def __init__(self) -> None:
        self.heard = b""
        self._answers: deque[bytes] = deque()

    def attached(self, queues: DeviceQueues) -> None:
        self._queues = queues

    def handle(self, queue: int, chain: VirtioChain) -> None:
        data = chain.read()
        self.heard += data
        self._answers.append(data.upper())
        self.buffers(RECEIVE)

    def buffers(self, queue: int) -> None:
        while self._answers and (chain := self._queues.take(RECEIVE)) is not None:
            answer = self._answers.popleft()
            written = chain.write(answer)
            chain.done()
            if written < len(answer):
                self._answers.appendleft(answer[written:])

    def negotiated(self, features: int) -> None:
        if not features:  # the driver has reset the device
            self._answers.clear()

    def save(self) -> list[str]:
        return [answer.hex() for answer in self._answers]

    def load(self, state: list[str]) -> None:
        self._answers = deque(map(bytes.fromhex, state))


def main() -> None:
    with Machine() as vm:
        vm.attach_virtio(ShoutingConsole())
        vm.start()
        vm.console.expect("# ")
        vm.console.send("exec 3<>/dev/hvc0; stty raw -echo <&3\n")
        vm.console.expect("# ")
        vm.console.send("echo hello >&3; read -r line <&3; echo it says $line\n")
        vm.console.expect("it says HELLO")
        print("the guest said hello, and was answered")


if __name__ == "__main__":
    main()
