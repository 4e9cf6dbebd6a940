"""What the standard library builds on: databases, compression, processes, decimal numbers."""

import asyncio
import bz2
import decimal
import hashlib
import json
import lzma
import mmap
import multiprocessing
import pickle
import random
import sqlite3
import statistics
import zlib
from fractions import Fraction


def squares(limit: int) -> int:
    return sum(number * number for number in range(limit))


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


async def count(name: str, steps: int) -> str:
    for _ in range(steps):
        await asyncio.sleep(0.001)
    return f"{name}{steps}"


async def gather() -> list[str]:
    return await asyncio.gather(*(count("task", steps) for steps in range(5)))


def main() -> None:
    rng = random.Random(40)
    data = bytes(rng.choices(b"abcdefgh \n", k=200_000))
    for name, packed, again in (
        ("zlib", zlib.compress(data, 9), zlib.decompress),
        ("bz2", bz2.compress(data), bz2.decompress),
        ("lzma", lzma.compress(data, preset=1), lzma.decompress),
    ):
        print(name, len(packed), digest(packed), again(packed) == data)
    print(zlib.crc32(data), zlib.adler32(data))

    table = {f"key{number}": [rng.random(), rng.randint(-5, 5), None] for number in range(1000)}
    text = json.dumps(table, indent=1)
    print(digest(text.encode()), json.loads(text) == table)
    print(digest(pickle.dumps(table, protocol=4)))

    database = sqlite3.connect(":memory:")
    database.execute("create table numbers (id integer primary key, value real, word text)")
    rows = [(number, rng.random(), f"word {rng.randint(0, 99)}") for number in range(5000)]
    database.executemany("insert into numbers values (?, ?, ?)", rows)
    question = (
        "select word, count(*), sum(value), max(id) from numbers group by word order by 2 desc, 1"
    )
    print(digest(repr(database.execute(question).fetchall()).encode()))

    decimal.getcontext().prec = 200
    print(decimal.Decimal(2).sqrt(), decimal.Decimal(10).ln())
    print(sum(Fraction(1, number) for number in range(1, 200)))
    print(statistics.stdev(value for _, value, _ in rows))
    with multiprocessing.Pool(3) as pool:
        print(pool.map(squares, range(0, 30_000, 3000)))
    print(asyncio.run(gather()))
    with mmap.mmap(-1, 1 << 20) as memory:
        memory[:] = data[:1024] * 1024
        print(digest(memory[5:-7]), memory[500:].index(b"ga"))


if __name__ == "__main__":
    main()
