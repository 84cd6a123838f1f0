"""A second reader of `docs/format.md`, written from that text alone, in slow plain Python.

It shares no code with the package and needs no library but `cryptography`: no numpy, torch or qrcode. The QR
symbol (version 1, level H, numeric, mask 0) is built here from ISO/IEC 18004.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import math
import struct
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

SIDE = 21


def lp(part: bytes) -> bytes:
    return struct.pack(">Q", len(part)) + part


def key_of(opening: dict[str, str]) -> bytes:
    spec = base64.b64decode(opening["spec"])
    public_key = bytes.fromhex(opening["public_key"])
    signature = bytes.fromhex(opening["signature"])
    message = b"mtlsign/v0/spec" + lp(spec) + lp(public_key)
    Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    return hashlib.sha256(b"mtlsign/v0/key" + lp(spec) + lp(public_key) + lp(signature)).digest()


def stream_bits(key: bytes, label: str, count: int) -> str:
    extracted = hmac.digest(bytes(32), key, "sha256")
    subkey = hmac.digest(extracted, label.encode() + b"\x01", "sha256")
    size = (count + 7) // 8
    stream = Cipher(algorithms.ChaCha20(subkey, bytes(16)), None).encryptor().update(bytes(size))
    return "".join(f"{byte:08b}" for byte in stream)[:count]


def width_m(n: int) -> int:
    exponent = 0
    while 2**exponent < n:
        exponent += 1
    return 3 * exponent


def integers(key: bytes, n: int) -> list[int]:
    m = width_m(n)
    bits = stream_bits(key, "mtlsign/v0/integers", 2 * n * m)
    found: dict[int, None] = {}
    for start in range(0, len(bits), m):
        found.setdefault(int(bits[start : start + m], 2))
        if len(found) == n:
            return list(found)
    raise AssertionError("2·n draws held fewer than n distinct integers")


# --- the QR symbol --------------------


def times(a: int, b: int) -> int:
    """Product in GF(256) modulo x⁸ + x⁴ + x³ + x² + 1."""
    out = 0
    while b:
        if b & 1:
            out ^= a
        a = a << 1 ^ (0x11D if a & 0x80 else 0)
        b >>= 1
    return out


def codewords(digits: str) -> list[int]:
    """9 data codewords and 17 error correction codewords."""
    bits = "0001" + f"{len(digits):010b}"
    for start in range(0, len(digits), 3):
        group = digits[start : start + 3]
        bits += f"{int(group):0{ {3: 10, 2: 7, 1: 4}[len(group)] }b}"
    bits += "0" * min(4, 72 - len(bits))
    bits += "0" * (-len(bits) % 8)
    data = [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]
    while len(data) < 9:
        data += [0xEC, 0x11]
    data = data[:9]
    generator, root = [1], 1
    for _ in range(17):
        shifted = [times(root, c) for c in generator]
        generator = [a ^ b for a, b in zip([*generator, 0], [0, *shifted], strict=True)]
        root = times(root, 2)
    rest = data + [0] * 17
    for i in range(9):
        factor = rest[i]
        for j, c in enumerate(generator):
            rest[i + j] ^= times(factor, c)
    return data + rest[9:]


def format_bits() -> list[int]:
    """15 bits for level H (10) and mask 000, least significant first."""
    data = 0b10000
    rest = data << 10
    for shift in range(4, -1, -1):
        if rest >> (10 + shift) & 1:
            rest ^= 0b10100110111 << shift
    value = (data << 10 | rest) ^ 0b101010000010010
    return [value >> i & 1 for i in range(15)]


def symbol(digits: str) -> list[list[int]]:
    grid: list[list[int]] = [[-1] * SIDE for _ in range(SIDE)]
    for top, left in ((0, 0), (0, 14), (14, 0)):
        for r in range(top - 1, top + 8):
            for c in range(left - 1, left + 8):
                if 0 <= r < SIDE and 0 <= c < SIDE:
                    ring = max(abs(r - top - 3), abs(c - left - 3))
                    grid[r][c] = int(ring not in (2, 4))
    for i in range(8, 13):
        grid[6][i] = grid[i][6] = int(i % 2 == 0)
    f = format_bits()
    for i in range(15):
        grid[i if i < 6 else i + 1 if i < 8 else i + 6][8] = f[i]
        grid[8][20 - i if i < 8 else 7 if i == 8 else 14 - i] = f[i]
    grid[13][8] = 1
    bits = "".join(f"{byte:08b}" for byte in codewords(digits))
    position = 0
    upward = True
    for right in (20, 18, 16, 14, 12, 10, 8, 5, 3, 1):
        for r in range(20, -1, -1) if upward else range(SIDE):
            for c in (right, right - 1):
                if grid[r][c] == -1:
                    grid[r][c] = int(bits[position]) ^ int((r + c) % 2 == 0)
                    position += 1
        upward = not upward
    assert position == len(bits) == 208
    return grid


def image(grid: list[list[int]], carrier: dict[str, Any]) -> bytes:
    """float32, little-endian, [channels, height, width]."""
    size = carrier["module"]
    top, left = (carrier["height"] - SIDE * size) // 2, (carrier["width"] - SIDE * size) // 2
    plane = b""
    for y in range(carrier["height"]):
        for x in range(carrier["width"]):
            r, c = (y - top) // size, (x - left) // size
            value = grid[r][c] if 0 <= r < SIDE and 0 <= c < SIDE else carrier["pad"]
            plane += struct.pack("<f", (1000 * value - carrier["mean_milli"]) / carrier["std_milli"])
    return plane * int(carrier["channels"])


# --- the whole vector --------------------


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def expand(opening: dict[str, str], *, d: int) -> dict[str, Any]:
    """Everything a key fixes, in the form of `vectors.json`."""
    key = key_of(opening)
    spec = json.loads(base64.b64decode(opening["spec"]))
    n, carrier = spec["n"], spec["carrier"]
    pi = integers(key, n)
    label_bits = stream_bits(key, "mtlsign/v0/labels", n)
    sign_bits = stream_bits(key, "mtlsign/v0/signs/0", d)
    drawn = []
    for integer in pi[:2]:
        grid = symbol(f"{integer:0{carrier['digits']}d}")
        drawn.append({
            "integer": integer,
            "rows": ["".join(map(str, row)) for row in grid],
            "modules_sha256": sha256(bytes(cell for row in grid for cell in row)),
            "image_sha256": sha256(image(grid, carrier)),
        })  # fmt: skip
    return {
        "key": key.hex(),
        "m": width_m(n),
        "integers_first": pi[:8],
        "integers_sha256": sha256(b"".join(struct.pack(">Q", i) for i in pi)),
        "labels_first": label_bits[:64],
        "labels_sha256": sha256(bytes(map(int, label_bits))),
        "d": d,
        "signs_first": "".join("+" if bit == "1" else "-" for bit in sign_bits[:64]),
        "signs_sha256": sha256(bytes(map(int, sign_bits))),
        "images": drawn,
    }


def tail_bits(k: int, n: int) -> float:
    """-log2 P(X >= k), X ~ Binomial(n, 1/2)."""
    return n - math.log2(sum(math.comb(n, i) for i in range(k, n + 1)))


def weighted_tail_bits(weights: list[int], correct: list[int]) -> float:
    """The weighted statistic's tail, by the plain dynamic programme."""
    counts = {0: 1}
    for weight in weights:
        grown = dict(counts)
        for total, count in counts.items():
            grown[total + weight] = grown.get(total + weight, 0) + count
        counts = grown
    observed = sum(w for w, c in zip(weights, correct, strict=True) if c)
    return len(weights) - math.log2(sum(count for total, count in counts.items() if total >= observed))


def open_identity(text: str, passphrase: bytes) -> bytes:
    """Seed ‖ kit key from a protected identity file."""
    fields = json.loads(text)
    salt = bytes.fromhex(fields["salt"])
    wrapping = hashlib.scrypt(passphrase, salt=salt, n=32768, r=8, p=1, maxmem=2**26, dklen=32)
    associated = b"mtlsign/identity/v0" + lp(bytes.fromhex(fields["public_key"]))
    sealed = bytes.fromhex(fields["ciphertext"])
    return ChaCha20Poly1305(wrapping).decrypt(bytes.fromhex(fields["nonce"]), sealed, associated)
