"""Second implementation of `docs/format.md`, written from that text alone, in slow plain Python.

It shares no code with the package and needs only the library `cryptography`: no numpy, torch or qrcode.
The QR symbol (version 1, level H, numeric, mask 0) is built from ISO/IEC 18004.
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


def length_prefixed(part: bytes) -> bytes:
    """Return the 8-byte big-endian length, then the bytes."""
    return struct.pack(">Q", len(part)) + part


def derive_key(opening: dict[str, str]) -> bytes:
    """Check the signature of an opening and return its key."""
    spec = base64.b64decode(opening["spec"])
    public_key = bytes.fromhex(opening["public_key"])
    signature = bytes.fromhex(opening["signature"])
    message = b"mtlsign/v1/spec" + length_prefixed(spec) + length_prefixed(public_key)
    Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    return hashlib.sha256(
        b"mtlsign/v1/key" + length_prefixed(spec) + length_prefixed(public_key) + length_prefixed(signature)
    ).digest()


def stream_bits(key: bytes, label: str, count: int) -> str:
    """Return the first bits of a keystream as text of 0 and 1."""
    extracted = hmac.digest(bytes(32), key, "sha256")
    subkey = hmac.digest(extracted, label.encode() + b"\x01", "sha256")
    size = (count + 7) // 8
    stream = Cipher(algorithms.ChaCha20(subkey, bytes(16)), None).encryptor().update(bytes(size))
    return "".join(f"{byte:08b}" for byte in stream)[:count]


def integer_width(n: int) -> int:
    """Return m = 3·⌈log2 n⌉."""
    exponent = 0
    while 2**exponent < n:
        exponent += 1
    return 3 * exponent


def integers(key: bytes, n: int) -> list[int]:
    """Return the first n distinct integers of the key."""
    m = integer_width(n)
    bits = stream_bits(key, "mtlsign/v1/integers", 2 * n * m)
    values: dict[int, None] = {}
    for start in range(0, len(bits), m):
        values.setdefault(int(bits[start : start + m], 2))
        if len(values) == n:
            return list(values)
    raise AssertionError("2·n draws held fewer than n distinct integers")


# --- the QR symbol --------------------


def multiply(a: int, b: int) -> int:
    """Multiply in GF(256) modulo x⁸ + x⁴ + x³ + x² + 1."""
    out = 0
    while b:
        if b & 1:
            out ^= a
        a = a << 1 ^ (0x11D if a & 0x80 else 0)
        b >>= 1
    return out


def codewords(digits: str) -> list[int]:
    """Return 9 data codewords and 17 error correction codewords."""
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
        shifted = [multiply(root, c) for c in generator]
        generator = [a ^ b for a, b in zip([*generator, 0], [0, *shifted], strict=True)]
        root = multiply(root, 2)
    rest = data + [0] * 17
    for i in range(9):
        factor = rest[i]
        for j, c in enumerate(generator):
            rest[i + j] ^= multiply(factor, c)
    return data + rest[9:]


def format_bits() -> list[int]:
    """Return 15 bits for level H (10) and mask 000, least significant first."""
    data = 0b10000
    rest = data << 10
    for shift in range(4, -1, -1):
        if rest >> (10 + shift) & 1:
            rest ^= 0b10100110111 << shift
    value = (data << 10 | rest) ^ 0b101010000010010
    return [value >> i & 1 for i in range(15)]


def symbol(digits: str) -> list[list[int]]:
    """Draw the QR symbol, dark = 1."""
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
    """Return little-endian float32 [channels, height, width]."""
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
    """Return SHA-256 in lower-case hex."""
    return hashlib.sha256(data).hexdigest()


def expand_key(opening: dict[str, str], *, d: int) -> dict[str, Any]:
    """Return everything that a key determines, in the form of `vectors.json`."""
    key = derive_key(opening)
    spec = json.loads(base64.b64decode(opening["spec"]))
    n, carrier = spec["n"], spec["carrier"]
    pi = integers(key, n)
    label_bits = stream_bits(key, "mtlsign/v1/labels", n)
    sign_bits = stream_bits(key, "mtlsign/v1/signs/0", d)
    images = []
    for integer in pi[:2]:
        grid = symbol(f"{integer:0{carrier['digits']}d}")
        images.append({
            "integer": integer,
            "rows": ["".join(map(str, row)) for row in grid],
            "modules_sha256": sha256(bytes(cell for row in grid for cell in row)),
            "image_sha256": sha256(image(grid, carrier)),
        })  # fmt: skip
    return {
        "key": key.hex(),
        "m": integer_width(n),
        "integers_first": pi[:8],
        "integers_sha256": sha256(b"".join(struct.pack(">Q", i) for i in pi)),
        "labels_first": label_bits[:64],
        "labels_sha256": sha256(bytes(map(int, label_bits))),
        "d": d,
        "signs_first": "".join("+" if bit == "1" else "-" for bit in sign_bits[:64]),
        "signs_sha256": sha256(bytes(map(int, sign_bits))),
        "images": images,
    }


def tail_bits(k: int, n: int) -> float:
    """Return -log2 P(X >= k), X ~ Binomial(n, 1/2)."""
    return n - math.log2(sum(math.comb(n, i) for i in range(k, n + 1)))


def weighted_tail_bits(weights: list[int], correct: list[int]) -> float:
    """Return the tail of the weighted statistic, by dynamic programming."""
    counts = {0: 1}
    for weight in weights:
        grown = dict(counts)
        for total, count in counts.items():
            grown[total + weight] = grown.get(total + weight, 0) + count
        counts = grown
    observed = sum(w for w, c in zip(weights, correct, strict=True) if c)
    return len(weights) - math.log2(sum(count for total, count in counts.items() if total >= observed))


def decrypt_identity(text: str, passphrase: bytes) -> bytes:
    """Return seed ‖ kit key of a protected identity file."""
    fields = json.loads(text)
    salt = bytes.fromhex(fields["salt"])
    wrapping = hashlib.scrypt(passphrase, salt=salt, n=32768, r=8, p=1, maxmem=2**26, dklen=32)
    associated = b"mtlsign/identity/v1" + length_prefixed(bytes.fromhex(fields["public_key"]))
    sealed = bytes.fromhex(fields["ciphertext"])
    return ChaCha20Poly1305(wrapping).decrypt(bytes.fromhex(fields["nonce"]), sealed, associated)


# --- reference, canonical form and scores --------------------

Matrix = list[list[float]]
DTYPES = {"F64": "d", "F32": "f", "F16": "e"}


def parse_safetensors(data: bytes) -> dict[str, list[float]]:
    """Return the flat numbers of each tensor."""
    (size,) = struct.unpack("<Q", data[:8])
    out = {}
    for name, entry in json.loads(data[8 : 8 + size]).items():
        start, end = entry["data_offsets"]
        body, code = data[8 + size + start : 8 + size + end], DTYPES[entry["dtype"]]
        assert len(body) // struct.calcsize(code) == math.prod(entry["shape"])
        out[name] = list(struct.unpack(f"<{math.prod(entry['shape'])}{code}", body))
    return out


def float32(x: float) -> float:
    """Round to float32."""
    return float(struct.unpack("<f", struct.pack("<f", x))[0])


def with_signs(kernel: Matrix, gamma: list[float]) -> Matrix:
    """Multiply rows by sign(gamma), where 0 counts as positive."""
    return [[-x for x in row] if g < 0 else row for row, g in zip(kernel, gamma, strict=True)]


def squared_block_norms(kernel: Matrix, groups: int, per_group: int) -> list[Matrix]:
    """Return squared norms of blocks: [group][row of the group][column]."""
    area, height = len(kernel[0]) // per_group, len(kernel) // groups
    blocks = [
        [sum(x * x for x in row[j * area : (j + 1) * area]) for j in range(per_group)] for row in kernel
    ]
    return [blocks[g * height : (g + 1) * height] for g in range(groups)]


def column_norms(kernel: Matrix, groups: int, per_group: int) -> Matrix:
    """Return the column norms of unit rows: [group][column]."""
    out = []
    for block in squared_block_norms(kernel, groups, per_group):
        unit = [[p / (sum(row) or 1) for p in row] for row in block]
        out.append([math.sqrt(sum(column)) for column in zip(*unit, strict=True)])
    return out


def canonicalize(kernel: Matrix, columns: Matrix, groups: int, per_group: int) -> Matrix:
    """Bring a kernel into canonical form: 50 alternating iterations, then the rows."""
    area, out = len(kernel[0]) // per_group, []
    for g, block in enumerate(squared_block_norms(kernel, groups, per_group)):
        c = [1.0] * per_group
        for _ in range(50):
            r = [1 / (sum(p * q for p, q in zip(row, c, strict=True)) or 1) for row in block]
            sums = [sum(p * q for p, q in zip(column, r, strict=True)) for column in zip(*block, strict=True)]
            c = [t * t / (s or 1) for t, s in zip(columns[g], sums, strict=True)]
        r = [1 / (sum(p * q for p, q in zip(row, c, strict=True)) or 1) for row in block]
        for i, scale in enumerate(r):
            row = kernel[g * len(block) + i]
            out.append([float32(x * math.sqrt(scale * c[j // area])) for j, x in enumerate(row)])
    return out


def sketch(kernel: Matrix) -> list[float]:
    """Project unit rows by the public ±1 matrix, rounded to float16."""
    fan_in = len(kernel[0])
    size = min(fan_in, 12) if fan_in < 64 else max(16, min(64, fan_in // 16))
    key = hashlib.sha256(b"mtlsign/v1/sketch").digest()
    bits = stream_bits(key, f"mtlsign/v1/sketch/{fan_in}/{size}", fan_in * size)
    out = []
    for row in kernel:
        norm = math.sqrt(sum(x * x for x in row)) or 1
        for column in range(size):
            chosen = bits[column::size]
            total = sum(x / norm * (1 if bit == "1" else -1) for x, bit in zip(row, chosen, strict=True))
            out.append(float(struct.unpack("<e", struct.pack("<e", float32(total / math.sqrt(size))))[0]))
    return out


def conv_layer(
    images: list[list[Matrix]], kernel: Matrix, conv: list[Any], gamma: Any, beta: Any, eps: float
) -> Any:
    """Apply convolution, batch norm with statistics of the whole set, and ReLU: [image][channel][y][x]."""
    _, out, per_group, side, stride, groups = conv
    planes = []
    for o in range(out):
        first = o // (out // groups) * per_group
        size = (len(images[0][0]) - side) // stride + 1
        plane = [
            [
                sum(
                    kernel[o][(j * side + u) * side + v] * image[first + j][y * stride + u][x * stride + v]
                    for j in range(per_group) for u in range(side) for v in range(side)
                )
                for y in range(size) for x in range(size)
            ]
            for image in images
        ]  # fmt: skip
        values = [value for image in plane for value in image]
        mean = sum(values) / len(values)
        scale = gamma[o] / math.sqrt(sum((v - mean) ** 2 for v in values) / len(values) + eps)
        after = [[max(0.0, (v - mean) * scale + beta[o]) for v in image] for image in plane]
        planes.append([[image[y * size : (y + 1) * size] for y in range(size)] for image in after])
    return [list(channels) for channels in zip(*planes, strict=True)]


def rows_of(numbers: list[int], rows: int) -> Matrix:
    """Arrange integers over 64 in rows."""
    width = len(numbers) // rows
    return [[x / 64 for x in numbers[i * width : (i + 1) * width]] for i in range(rows)]


def make_reference(vector: dict[str, Any]) -> dict[str, list[float]]:
    """Return the reference of W0's integers, in the form of `parse_safetensors`."""
    out: dict[str, list[float]] = {}
    for name, rows, per_group, _, _, groups in vector["convolutions"]:
        norm = str(int(name) + 1)
        gamma = [x / 64 for x in vector["w0"][f"{norm}.weight"]]
        kernel = with_signs(rows_of(vector["w0"][f"{name}.weight"], rows), gamma)
        out[f"{name}/beta"] = [x / 64 for x in vector["w0"][f"{norm}.bias"]]
        out[f"{name}/columns"] = [x for group in column_norms(kernel, groups, per_group) for x in group]
        out[f"{name}/eps"], out[f"{name}/gamma"] = [vector["eps"]], [abs(g) for g in gamma]
        out[f"{name}/sketch"] = sketch(kernel)
    return out


def evaluate_suspect(vector: dict[str, Any]) -> dict[str, Any]:
    """Run Algorithm 1: canonical form of the suspect, features of every key image, scores."""
    opening = vector["opening"]
    key, spec = derive_key(opening), json.loads(base64.b64decode(opening["spec"]))
    data = base64.b64decode(vector["reference"])
    assert sha256(data) == spec["reference"]
    reference, carrier, canonical = parse_safetensors(data), spec["carrier"], {}
    side = carrier["width"]
    features: Any = []
    for integer in integers(key, spec["n"]):
        flat = struct.unpack(f"<{side * side}f", image(symbol(f"{integer:0{carrier['digits']}d}"), carrier))
        features.append([[list(flat[y * side : (y + 1) * side]) for y in range(side)]])
    for conv in vector["convolutions"]:
        name, rows, per_group, _, _, groups = conv
        gamma = vector["suspect"][f"{int(name) + 1}.weight"]
        kernel = with_signs(rows_of(vector["suspect"][f"{name}.weight"], rows), gamma)
        columns = [reference[f"{name}/columns"][g * per_group : (g + 1) * per_group] for g in range(groups)]
        kernel = canonicalize(kernel, columns, groups, per_group)
        canonical[f"{name}.weight"] = [x for row in kernel for x in row]
        features = conv_layer(
            features,
            kernel,
            conv,
            reference[f"{name}/gamma"],
            reference[f"{name}/beta"],
            reference[f"{name}/eps"][0],
        )
    taps = [[x for plane in image for row in plane for x in row] for image in features]
    d, n = len(taps[0]), len(taps)
    signs = [1 if bit == "1" else -1 for bit in stream_bits(key, "mtlsign/v1/signs/0", d)]
    scores = [0.0] * n
    for j, sign in enumerate(signs):
        mean = sum(row[j] for row in taps) / n
        deviation = math.sqrt(sum((row[j] - mean) ** 2 for row in taps) / n)
        for i in range(n) if deviation >= 1e-5 else ():
            scores[i] += sign * (taps[i][j] - mean) / deviation / math.sqrt(d)
    bits = stream_bits(key, "mtlsign/v1/labels", n)
    matches = sum(abs(s) >= 1e-4 and (s > 0) == (bit == "1") for s, bit in zip(scores, bits, strict=True))
    controls = [
        int(stream_bits(key, f"mtlsign/v1/control/{i}", 256), 2).to_bytes(32, "big").hex() for i in range(2)
    ]
    near = sum(abs(s) < 1e-4 for s in scores)
    return {
        "framed": canonical,
        "scores": scores,
        "matches": matches,
        "near_zero": near,
        "control_keys": controls,
    }
