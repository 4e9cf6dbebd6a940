"""Writes an RSA key that is always the same, as PKCS #1 DER (RFC 8017, appendix A.1.2)."""

import random
import sys
from pathlib import Path


def is_prime(number: int, rng: random.Random) -> bool:
    if any(number % small == 0 for small in (3, 5, 7, 11, 13, 17, 19, 23, 29, 31)):
        return False
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for _ in range(20):
        x = pow(rng.randrange(2, number - 1), odd, number)
        if x in (1, number - 1):
            continue
        for _ in range(twos - 1):
            x = x * x % number
            if x == number - 1:
                break
        else:
            return False
    return True


def prime(bits: int, rng: random.Random) -> int:
    while True:
        # The two high bits make the product of two primes as long as it should be.
        number = rng.getrandbits(bits) | 3 << (bits - 2) | 1
        if number % 65537 != 1 and is_prime(number, rng):
            return number


def der(tag: int, content: bytes) -> bytes:
    size = len(content)
    if size < 128:
        return bytes((tag, size)) + content
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(length))) + length + content


def integer(value: int) -> bytes:
    return der(2, value.to_bytes(value.bit_length() // 8 + 1, "big"))


source = random.Random(50)
p, q = prime(1024, source), prime(1024, source)
d = pow(65537, -1, (p - 1) * (q - 1))
fields = (0, p * q, 65537, d, p, q, d % (p - 1), d % (q - 1), pow(q, -1, p))
Path(sys.argv[1]).write_bytes(der(0x30, b"".join(map(integer, fields))))
