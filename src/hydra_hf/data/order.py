"""Shuffled orders without a list of them: where a number is in a permutation, in constant memory."""

import hashlib

import numpy as np


NUM_ROUNDS = 6
WORD = (1 << 64) - 1


def key_of(*key) -> int:
    """64 bits that depend on nothing but `key`."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest())


def shuffled(place: int, length: int, key: int) -> int:
    """What is at `place` in the permutation of `length` numbers that belongs to `key`.

    A Feistel network over the next power of four; a number beyond the length is permuted again (cycle walking).
    """
    half = max(1, ((length - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for number in range(NUM_ROUNDS):
            left, right = right, left ^ (_mixed(right + key + (number << 48)) & mask)
        place = left << half | right
        if place < length:
            return place


def _mixed(value: int) -> int:
    """64 bits, each of which depends on all of `value`: the finaliser of SplitMix64."""
    value = (value + 0x9E3779B97F4A7C15) & WORD
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & WORD
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & WORD
    return value ^ value >> 31


class OrderInBlocks:
    """A permutation that stays in one neighbourhood for a while: parts in shuffled order, joined into blocks of up to
    `block_size` records (or one larger part), each block shuffled. For files that are best read piece by piece.

    Args:
        parts: ranges of record numbers that are stored together.
    """

    def __init__(self, parts: list[range], key: int, block_size: int = 1024):
        self.key = key
        order = np.random.Generator(np.random.Philox(key)).permutation(len(parts))
        self.firsts = np.array([parts[part].start for part in order])
        self.ends = np.cumsum([len(parts[part]) for part in order])
        blocks, start = [0], 0
        for previous, end in zip(self.ends[:-1], self.ends[1:]):
            if end - start > block_size:
                start = previous
                blocks.append(previous)
        self.blocks = np.array([*blocks, self.ends[-1]])

    def block_of(self, place: int) -> tuple[int, range]:
        """The number of the block of a place, and all places of the block."""
        block = int(np.searchsorted(self.blocks, place, side="right")) - 1
        return block, range(int(self.blocks[block]), int(self.blocks[block + 1]))

    def __getitem__(self, place: int) -> int:
        """The number of the record at `place`."""
        block, places = self.block_of(place)
        inner = places.start + shuffled(place - places.start, len(places), key_of(self.key, block))
        part = int(np.searchsorted(self.ends, inner, side="right"))
        start = int(self.ends[part - 1]) if part else 0
        return int(self.firsts[part]) + inner - start
