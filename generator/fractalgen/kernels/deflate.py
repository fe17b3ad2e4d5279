"""Deflate (RFC 1951) for noise: one dynamic Huffman block of literals, without a search for matches.

Rendered images have a noise background, in which a search finds almost nothing. On their filtered rows this encoder
takes half the time of ISA-L's fastest level, and writes fewer bytes, the same on every CPU. Images that are mostly one
colour, such as those without a background, are left to ISA-L.
"""

import struct

import numpy as np
import numpy.typing as npt
from isal import isal_zlib
from numba import njit, uint32, uint64

from fractalgen.kernels import CACHE
from fractalshards.png import Indexed, Pixels, encode_png, isal_compress

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]

_ZLIB_HEADER = b"\x78\x01"
_END = 256  # the symbol that ends a block
_MAX_LENGTH = 15  # bits of a code
_MOSTLY = 0.75  # if one byte makes up more than this share, there are runs, and searching for matches pays

# The header of a last, dynamic block, as values and bits: 257 literals, 2 distances, code lengths 0..15 of four bits.
_ORDER = (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15)
_FIELDS = [(1, 1), (2, 2), (0, 5), (1, 5), (15, 4), *((4 if symbol < 16 else 0, 3) for symbol in _ORDER)]
_BLOCK_START = np.array([value >> bit & 1 for value, bits in _FIELDS for bit in range(bits)], np.uint8)


def encode_image(image: Pixels | Indexed) -> bytes:
    """Encode a rendered image as PNG: noise in RGB with ``zlib_compress``, a fractal on black with ISA-L."""
    return encode_png(image, isal_compress if isinstance(image, Indexed) else zlib_compress)


def zlib_compress(rows: npt.NDArray[np.uint8]) -> bytes:
    """Compress uint8 of any shape, contiguous and not empty, to a zlib stream (RFC 1950); ISA-L takes long runs."""
    data = rows.reshape(-1)
    counts = np.append(_histogram(data), uint32(1))
    if counts.max() > _MOSTLY * len(data):
        return isal_compress(rows)
    lengths = _code_lengths(counts, _MAX_LENGTH)
    # four bits per code, the high one first, also of two unused distances: some decoders expect a complete set of them
    digits = np.unpackbits(np.append(lengths, np.ones(2, np.uint8))[:, None], axis=1)[:, 4:]
    header = np.concatenate([_BLOCK_START, digits.reshape(-1)])
    bits = len(header) + int(counts @ lengths)
    words = np.zeros(bits // 32 + 2, "<u4")
    packed = np.packbits(header, bitorder="little")
    words.view(np.uint8)[: len(packed)] = packed
    _encode(data, _codes(lengths), words, len(header))
    body = words.tobytes()[: -(-bits // 8)]
    return _ZLIB_HEADER + body + struct.pack(">I", isal_zlib.adler32(data))


@njit(cache=CACHE)
def _histogram(data: Bytes) -> npt.NDArray[np.uint32]:
    """Count the bytes, in four tables, because consecutive increments of one counter wait for each other."""
    tables = np.zeros((4, 256), np.uint32)
    first, second, third, fourth = tables[0], tables[1], tables[2], tables[3]
    one = uint32(1)
    for group in range(len(data) // 4):
        i = uint64(4) * uint64(group)
        first[data[i]] += one
        second[data[i + uint64(1)]] += one
        third[data[i + uint64(2)]] += one
        fourth[data[i + uint64(3)]] += one
    for k in range(len(data) - len(data) % 4, len(data)):
        first[data[k]] += one
    counts: npt.NDArray[np.uint32] = first + second + third + fourth
    return counts


@njit(cache=CACHE)
def _code_lengths(counts: npt.NDArray[np.uint32], limit: int) -> Bytes:
    """Compute the length of each symbol's Huffman code, 0 for symbols that do not occur; at least two must occur.

    Leaves and nodes are merged from two sorted queues. Codes above the limit are cut to it; the sum of 2**-length, then
    too large, is brought back to 1 by lengthening the longest codes below the limit.
    """
    order = np.argsort(counts, kind="mergesort")  # stable, so that ties are the same on every machine
    used = order[np.count_nonzero(counts == 0) :]
    leaves = len(used)
    nodes = 2 * leaves - 1
    weights = np.empty(nodes, np.int64)
    parents = np.zeros(nodes, np.int64)
    weights[:leaves] = counts[used]
    leaf, node = 0, leaves
    for new in range(leaves, nodes):
        weights[new] = 0
        for _ in range(2):
            if leaf < leaves and (node >= new or weights[leaf] <= weights[node]):
                child = leaf
                leaf += 1
            else:
                child = node
                node += 1
            weights[new] += weights[child]
            parents[child] = new
    depths = np.zeros(nodes, np.int64)
    for child in range(nodes - 2, -1, -1):
        depths[child] = depths[parents[child]] + 1
    of_length = np.bincount(np.minimum(depths[:leaves], limit), minlength=limit + 1)
    excess = -(1 << limit)
    for length in range(1, limit + 1):
        excess += of_length[length] << (limit - length)
    while excess > 0:
        length = limit - 1
        while of_length[length] == 0:
            length -= 1
        of_length[length] -= 1
        of_length[length + 1] += 2
        of_length[limit] -= 1
        excess -= 1
    lengths = np.zeros(len(counts), np.uint8)
    symbol = 0
    for length in range(limit, 0, -1):  # rare symbols come first and get the long codes
        for _ in range(of_length[length]):
            lengths[used[symbol]] = length
            symbol += 1
    return lengths


@njit(cache=CACHE)
def _codes(lengths: Bytes) -> Words:
    """Return the canonical code of each symbol, reversed as deflate writes it, with its length in the upper 32 bits."""
    following = np.zeros(_MAX_LENGTH + 2, np.int64)
    of_length = np.bincount(lengths, minlength=_MAX_LENGTH + 1)
    for length in range(1, _MAX_LENGTH + 1):
        shorter = of_length[length - 1] if length > 1 else 0
        following[length] = (following[length - 1] + shorter) << 1
    codes = np.zeros(len(lengths), np.uint64)
    for symbol in range(len(lengths)):
        length = lengths[symbol]
        code = following[length]
        following[length] += 1
        reversed_code = 0
        for _ in range(length):
            reversed_code = reversed_code << 1 | code & 1
            code >>= 1
        codes[symbol] = uint64(reversed_code) | uint64(length) << uint64(32)
    return codes


@njit(cache=CACHE)
def _encode(data: Bytes, codes: Words, words: npt.NDArray[np.uint32], start: int) -> None:
    """Write the codes of all bytes and the end of the block from bit ``start`` on, without a branch in the loop."""
    low = uint64(0xFFFFFFFF)
    word, filled = uint64(start >> 5), uint64(start & 31)
    buffer = uint64(words[word])
    for pair in range(len(data) // 2):
        i = uint64(2) * uint64(pair)
        one, two = codes[data[i]], codes[data[i + uint64(1)]]
        both = one & low | (two & low) << (one >> uint64(32))
        buffer |= both << filled
        filled += (one >> uint64(32)) + (two >> uint64(32))
        words[word] = uint32(buffer & low)
        word += filled >> uint64(5)
        buffer >>= filled & uint64(32)
        filled &= uint64(31)
    for symbol in (data[-1] if len(data) % 2 else _END, _END):
        buffer |= (codes[symbol] & low) << filled
        filled += codes[symbol] >> uint64(32)
        words[word] = uint32(buffer & low)
        word += filled >> uint64(5)
        buffer >>= filled & uint64(32)
        filled &= uint64(31)
        if symbol == _END:
            break
    words[word] = uint32(buffer & low)
