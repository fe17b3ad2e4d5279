"""Sines, cosines and logarithms that are rounded correctly, and therefore the same on every CPU.

Sines are computed in double-double arithmetic (Dekker 1971): a value is the unevaluated sum of two float64. It needs
only additions and multiplications, which every CPU rounds alike; the compiler must not fuse them, and without
``fastmath`` numba does not.
"""

from decimal import Context, Decimal
from fractions import Fraction
from math import factorial

import numpy as np
import numpy.typing as npt
from numba import njit

from fractalgen.kernels import CACHE

Float64s = npt.NDArray[np.float64]
_Double = tuple[float, float]  # the larger part first

MAX_ANGLE = 1e5
_TERMS = 14  # of the Taylor series; on [-pi/4, pi/4] the next one is below 2**-110
_SPLITTER = 134217729.0  # 2**27 + 1
_PI = Fraction("3.141592653589793238462643383279502884197169399375105820974944592307816406286208998628034825342117")
_LOG_CONTEXT = Context(prec=50)


def _parts(value: Fraction, count: int) -> tuple[float, ...]:
    """Split a number into the sum of ``count`` float64."""
    first = float(value)
    return (first, *_parts(value - Fraction(first), count - 1)) if count > 1 else (first,)


_HALF_PI = _parts(_PI / 2, 3)
_SINE = np.array([_parts(Fraction((-1) ** k, factorial(2 * k + 1)), 2) for k in range(_TERMS)])
_COSINE = np.array([_parts(Fraction((-1) ** k, factorial(2 * k)), 2) for k in range(_TERMS)])


def log(x: float) -> float:
    """Return the natural logarithm of a positive number."""
    return float(Decimal(x).ln(_LOG_CONTEXT))


def sine_and_cosine(angles: Float64s) -> tuple[Float64s, Float64s]:
    """Return the sines and cosines of angles in [0, ``MAX_ANGLE``], each of the shape (n,) of the angles."""
    sines, cosines = np.empty_like(angles), np.empty_like(angles)
    _sine_and_cosine(angles, sines, cosines)
    return sines, cosines


@njit(cache=CACHE)
def _sine_and_cosine(angles: Float64s, sines: Float64s, cosines: Float64s) -> None:
    for i in range(len(angles)):
        quarter = np.floor(angles[i] / _HALF_PI[0] + 0.5)
        rest = (angles[i], 0.0)
        for part in _HALF_PI:
            rest = _add(rest, _multiply_floats(-quarter, part))
        square = _multiply(rest, rest)
        sine, cosine = _multiply(_series(_SINE, square), rest)[0], _series(_COSINE, square)[0]
        turn = int(quarter) & 3
        sines[i] = (sine, cosine, -sine, -cosine)[turn]
        cosines[i] = (cosine, -sine, -cosine, sine)[turn]


@njit(cache=CACHE)
def _series(terms: Float64s, square: _Double) -> _Double:
    """Sum terms[k] square**k by Horner's rule."""
    total = (0.0, 0.0)
    for k in range(_TERMS - 1, -1, -1):
        total = _add(_multiply(total, square), (terms[k, 0], terms[k, 1]))
    return total


@njit(inline="always")
def _add_floats(a: float, b: float) -> _Double:
    """Add exactly (Knuth's two-sum)."""
    total = a + b
    shadow = total - a
    return total, (a - (total - shadow)) + (b - shadow)


@njit(inline="always")
def _multiply_floats(a: float, b: float) -> _Double:
    """Multiply exactly (Dekker's product)."""
    product = a * b
    a_high = a * _SPLITTER - (a * _SPLITTER - a)
    b_high = b * _SPLITTER - (b * _SPLITTER - b)
    a_low, b_low = a - a_high, b - b_high
    return product, ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


@njit(cache=CACHE)
def _add(a: _Double, b: _Double) -> _Double:
    high, error = _add_floats(a[0], b[0])
    low, low_error = _add_floats(a[1], b[1])
    high, error = _add_floats(high, error + low)
    return _add_floats(high, error + low_error)


@njit(cache=CACHE)
def _multiply(a: _Double, b: _Double) -> _Double:
    high, error = _multiply_floats(a[0], b[0])
    return _add_floats(high, error + (a[0] * b[1] + a[1] * b[0]))
