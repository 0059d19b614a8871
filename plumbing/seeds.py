"""Randomness as a function of where it is used, so that no state of a generator needs to be kept."""

import zlib

import numpy as np


def mix_seed(purpose: str, *numbers: int) -> int:
    """One well-mixed 63-bit seed from what it is for and where it is used, the same on every machine."""
    entropy = (zlib.crc32(purpose.encode()), len(numbers), *numbers)
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)
