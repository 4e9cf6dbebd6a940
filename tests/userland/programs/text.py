"""Regular expressions, Unicode, dictionaries, exceptions, generators, hashes, signals, files."""

import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import unicodedata


def words(count: int) -> list[str]:
    rng = random.Random(30)
    letters = "abcdefghijklmnopqrstuvwxyzäöüßéñ"
    return ["".join(rng.choices(letters, k=rng.randint(1, 12))) for _ in range(count)]


def deep(level: int) -> int:
    return 0 if level == 0 else 1 + deep(level - 1)


text = " ".join(words(20_000))
print(len(text), hashlib.md5(text.encode()).hexdigest())
found = re.findall(r"\b([a-m]+)([n-z]+)\1?\b", text)
print(len(found), found[:5])
print(hashlib.sha1(re.sub(r"[aeiou](.)", r"<\1>", text).encode()).hexdigest())
print(hashlib.blake2b(unicodedata.normalize("NFD", text).upper().encode()).hexdigest())
counts: dict[str, int] = {}
for letter in text:
    counts[letter] = counts.get(letter, 0) + 1
print(sorted(counts.items(), key=lambda item: (-item[1], item[0])))
print(hashlib.sha3_256("".join(sorted(text.split())).encode("utf-16-le")).hexdigest())

print(deep(900))
sys.setrecursionlimit(500)
try:
    deep(10_000)
except RecursionError as error:
    print(type(error).__name__, error)

alarms: list[int] = []
signal.signal(signal.SIGALRM, lambda signum, frame: alarms.append(signum))
signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)
while len(alarms) < 5:
    time.sleep(0.005)
signal.setitimer(signal.ITIMER_REAL, 0)
print("alarms", alarms[:5])

total = 0
lock = threading.Lock()


def add() -> None:
    global total
    for _ in range(5000):
        with lock:
            total += 1


threads = [threading.Thread(target=add) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print("threads", total)

done = subprocess.run(["/bin/sh", "-c", "tr a-z A-Z; exit 7"], input=b"piped", capture_output=True)
print(done.stdout, done.returncode)

reader, writer = os.pipe()
child = os.fork()
if child == 0:
    os.write(writer, b"from the child")
    os.kill(os.getpid(), signal.SIGSEGV)
print(os.waitpid(child, 0)[1] & 0x7F, os.read(reader, 100))
