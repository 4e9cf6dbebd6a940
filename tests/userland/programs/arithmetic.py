"""Integers of any size, floating point and its text, random numbers."""

import hashlib
import math
import random
import struct


def pi_digits(count: int) -> str:
    """Gibbons' spigot."""
    out: list[str] = []
    q, r, t, k, n, x = 1, 0, 1, 1, 3, 3
    while len(out) < count:
        if 4 * q + r - t < n * t:
            out.append(str(n))
            q, r, n = q * 10, 10 * (r - n * t), 10 * (3 * q + r) // t - 10 * n
        else:
            numerator = q * (7 * k + 2) + r * x
            q, r, t, k, x = q * k, (2 * q + r) * x, t * x, k + 1, x + 2
            n = numerator // t
    return "".join(out)


def floats() -> None:
    rng = random.Random(20)
    functions = (
        *(math.sin, math.cos, math.tan, math.atan, math.exp2, math.cbrt, math.tanh, math.erf),
        *(math.floor, math.ceil, math.sinh, math.expm1, math.gamma),
    )
    for function in functions:
        digest = hashlib.sha256()
        for _ in range(2000):
            digest.update(repr(function(rng.uniform(-30.3, 30.3))).encode())
        print(function.__name__, digest.hexdigest())
    for value in (0.1, 1e300 * 1e10, -0.0, 5e-324, 2**53 + 1.0, 1 / 3, math.nan, 6.02214076e23):
        print(
            repr(value), value.hex(), f"{value:.30g} {value:e}", struct.pack("<fd", 1, value).hex()
        )
    digest = hashlib.sha256()
    for _ in range(5000):
        value = struct.unpack("<d", rng.randbytes(8))[0]
        digest.update(f"{value!r} {float(repr(value)).hex()}\n".encode())
    print("round trips", digest.hexdigest())


def integers() -> None:
    rng = random.Random(21)
    digest = hashlib.sha256()
    for bits in (8, 31, 64, 65, 500, 3000):
        for _ in range(200):
            a, b = rng.getrandbits(bits) - (1 << (bits - 1)), rng.getrandbits(bits // 2 + 1) + 1
            digest.update(f"{a * b} {a // b} {a % b} {a & b} {a ^ b} {math.gcd(a, b)}".encode())
            digest.update(f"{pow(a, 5, b)} {a << 7} {a >> 3} {math.isqrt(abs(a))}".encode())
    print("integers", digest.hexdigest())
    print("factorial", hashlib.sha256(str(math.factorial(1200)).encode()).hexdigest())


print(pi_digits(300))
floats()
integers()
numbers = [random.Random(22).gauss(0, 1) for _ in range(10)]
print(numbers, math.fsum(numbers), sorted(numbers)[3])
