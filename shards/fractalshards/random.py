"""splitmix64 (Steele, Lea & Flood, OOPSLA 2014): the random bits of generator and trainer, the same everywhere."""

MASK64 = (1 << 64) - 1
GOLDEN64 = 0x9E3779B97F4A7C15


def mix64(word: int) -> int:
    """The finaliser: a bijection of 64-bit words that spreads every bit."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK64
    return word ^ (word >> 31)
