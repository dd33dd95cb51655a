"""Make a dataset of JPEG files, `class_07/img_00123.jpg`, with the standard library alone and fast.

A baseline JPEG may restart its entropy coder after every row of MCUs (blocks of 16 x 16 pixels): each row is
then a run of whole bytes that depends on nothing before it. So a pool of rows is encoded once, by a plain
coder, and an image is a choice of rows joined by restart markers.

Invariants:

- The same arguments make the same bytes, on every machine.
- Each file is a complete baseline JPEG, and no two have the same content: a comment carries its number.
"""

from __future__ import annotations

import itertools
import math
import random
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SIZE_SIGMA = 0.35
POOL_BLOCKS = 96
POOL_ROWS = 64
MCU_PIXELS = 16
MCU_BLOCKS = 6  # 4 of luminance, 1 of each chrominance: 4:2:0
MCU_BYTES = 160  # what MCUs of these textures take: from it, the width of an image that is as high as wide
MAXIMAL_ROWS = 65535 // MCU_PIXELS

# ITU-T T.81, Annex K: the luminance tables, which serve all components here. A Huffman table is the number of
# its codes of 1 to 16 bits, then the symbols in the order of their codes.
QUANTISATION = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
DC_TABLE = bytes.fromhex("00010501010101010100000000000000") + bytes(range(12))
AC_TABLE = bytes.fromhex(
    "0002010303020403050504040000017d"
    "01020300041105122131410613516107227114328191a1082342b1c11552d1f02433627282090a161718191a25262728"
    "292a3435363738393a434445464748494a535455565758595a636465666768696a737475767778797a83848586878889"
    "8a92939495969798999aa2a3a4a5a6a7a8a9aab2b3b4b5b6b7b8b9bac2c3c4c5c6c7c8c9cad2d3d4d5d6d7d8d9dae1e2"
    "e3e4e5e6e7e8e9eaf1f2f3f4f5f6f7f8f9fa"
)
ZIGZAG = sorted(
    itertools.product(range(8), range(8)),
    key=lambda place: (sum(place), place[0] if sum(place) % 2 else place[1]),
)


@dataclass(frozen=True)
class DatasetSummary:
    files: int
    bytes: int


def make_dataset(
    directory: str | Path, *, files: int, classes: int, mean_bytes: int = 110_000, seed: int = 0
) -> DatasetSummary:
    """Write `files` JPEGs, dealt out to `classes` directories, of log-normal sizes around `mean_bytes`."""
    columns = max(1, round(math.sqrt(mean_bytes / MCU_BYTES)))
    rows = _row_pool(columns, random.Random(f"{seed} rows"))
    row_bytes = sum(map(len, rows)) / len(rows) + 2
    overhead = len(_image([], columns, b"0"))
    directories = [Path(directory, f"class_{number:0{_digits(classes, 2)}}") for number in range(classes)]
    for each in directories:
        each.mkdir(parents=True, exist_ok=True)
    total = 0
    for number in range(files):
        choice = random.Random(f"{seed} {number}")
        wanted = mean_bytes * math.exp(choice.gauss(-(SIZE_SIGMA**2) / 2, SIZE_SIGMA))
        height = min(MAXIMAL_ROWS, max(1, round((wanted - overhead) / row_bytes)))
        image = _image(choice.choices(rows, k=height), columns, f"{seed} {number}".encode())
        Path(directories[number % classes], f"img_{number:0{_digits(files, 5)}}.jpg").write_bytes(image)
        total += len(image)
    return DatasetSummary(files, total)


def _digits(count: int, least: int) -> int:
    return max(least, len(str(count - 1)))


def _image(rows: Sequence[bytes], columns: int, comment: bytes) -> bytes:
    quantisation = bytes(QUANTISATION[row][column] for row, column in ZIGZAG)
    components = bytes([1, 0x22, 0, 2, 0x11, 0, 3, 0x11, 0])
    size = struct.pack(">BHHB", 8, MCU_PIXELS * len(rows), MCU_PIXELS * columns, 3)
    parts = [
        b"\xff\xd8",
        _segment(0xE0, b"JFIF\0\x01\x01\0\0\x01\0\x01\0\0"),
        _segment(0xFE, comment),
        _segment(0xDB, b"\0" + quantisation),
        _segment(0xC0, size + components),
        _segment(0xC4, b"\0" + DC_TABLE),
        _segment(0xC4, b"\x10" + AC_TABLE),
        _segment(0xDD, struct.pack(">H", columns)),
        _segment(0xDA, bytes([3, 1, 0, 2, 0, 3, 0, 0, 63, 0])),
    ]
    for number, row in enumerate(rows):
        parts += [bytes([0xFF, 0xD0 + (number - 1) % 8]), row] if number else [row]
    return b"".join([*parts, b"\xff\xd9"])


def _segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def _row_pool(columns: int, choice: random.Random) -> list[bytes]:
    """Entropy-coded rows of MCUs: brightness and colour drift along a row over a few textures."""
    dc_codes, ac_codes = _huffman_codes(DC_TABLE), _huffman_codes(AC_TABLE)
    textures = [_ac_bits(_quantised_texture(choice), ac_codes) for _ in range(POOL_BLOCKS)]
    rows = []
    for _ in range(POOL_ROWS):
        bits = []
        level = [0, 0, 0]
        for _ in range(columns):
            for component in (0, 0, 0, 0, 1, 2):
                # 64 steps of the quantisation are black or white.
                change = max(-60, min(60, level[component] + choice.randint(-6, 6))) - level[component]
                level[component] += change
                bits += [dc_codes[change.bit_length()], _magnitude(change), choice.choice(textures)]
        bits.append("1" * (-sum(map(len, bits)) % 8))
        text = "".join(bits)
        rows.append(int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\0"))
    return rows


def _quantised_texture(choice: random.Random) -> list[int]:
    """The AC coefficients, in zigzag order, of a block with a gradient and more or less noise."""
    noise = choice.uniform(5, 60)
    slope = choice.uniform(-12, 12), choice.uniform(-12, 12)
    pixels = [[slope[0] * x + slope[1] * y + choice.gauss(0, noise) for x in range(8)] for y in range(8)]
    wave = [[math.cos((2 * x + 1) * u * math.pi / 16) for x in range(8)] for u in range(8)]
    scale = [math.sqrt(0.5), *[1.0] * 7]
    lines = [[sum(map(float.__mul__, line, wave[u])) for u in range(8)] for line in pixels]
    return [
        round(scale[u] * scale[v] / 4 * sum(lines[y][u] * wave[v][y] for y in range(8)) / QUANTISATION[v][u])
        for v, u in ZIGZAG[1:]
    ]


def _ac_bits(coefficients: Sequence[int], codes: dict[int, str]) -> str:
    bits = []
    zeros = 0
    for value in coefficients:
        if value == 0:
            zeros += 1
            continue
        bits += [codes[0xF0]] * (zeros // 16)
        bits += [codes[zeros % 16 << 4 | value.bit_length()], _magnitude(value)]
        zeros = 0
    return "".join([*bits, codes[0]] if zeros else bits)


def _magnitude(value: int) -> str:
    """The bits after the Huffman code of a value's length: the value, or the complement of a negative one."""
    if value == 0:
        return ""
    length = value.bit_length()
    return f"{value if value > 0 else value + (1 << length) - 1:0{length}b}"


def _huffman_codes(table: bytes) -> dict[int, str]:
    symbols = iter(table[16:])
    codes = {}
    code = 0
    for length, count in enumerate(table[:16], start=1):
        for symbol in itertools.islice(symbols, count):
            codes[symbol] = f"{code:0{length}b}"
            code += 1
        code <<= 1
    return codes
