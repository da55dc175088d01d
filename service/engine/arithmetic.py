"""Elementary functions from +, -, * and / alone, so that every machine and every implementation gets the same bits.

A library's exp or tanh differs in its last bits between processors, between versions, and even between the middle and
the end of one array. IEEE 754 fixes the results of the four operations and of rounding to the bit: all that is left is
to do them in one order and without fused multiply-adds. Who writes these functions again keeps order and constants.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]

VERSION = 1  # of everything that the bits of a text depend on beside the quantised weights; part of the fingerprint

# tanh(x) ~ x P(x^2) / Q(x^2) on +-7.2: a minimax fit, then lowered by 3e-7 so that rounding never gets past 1.
TANH_LIMIT = 7.2
TANH_P = (0.9999943971633911, 0.12275957316160202, 0.0022537289187312126, 3.821386144409189e-06)
TANH_Q = (1.0, 0.4560750126838684, 0.02096332237124443, 0.00013983642566017807)
TANH_ERROR = 2e-6  # at most

# Multiples of ln 2 in two parts: k * LN2_HIGH is exact for the k that occur.
LOG2_E = 1.4426950408889634
LN2_HIGH = 0.6931471803691238
LN2_LOW = 1.9082149292705877e-10
EXP_LOWEST = -700.0  # exp of anything below is 0: far below what a float64 sum of probabilities can notice
EXP_ERROR = 1e-11  # relative, at most
LOG_ERROR = 1e-11  # absolute, at most

# 0-d arrays: an operation with one takes numpy half as long as with a Python number.
_P0, _P1, _P2, _P3 = (np.array(value, np.float32) for value in TANH_P)
_Q0, _Q1, _Q2, _Q3 = (np.array(value, np.float32) for value in TANH_Q)
_HALF = np.array(0.5, np.float32)


def tanh(x: Float32, square: Float32, top: Float32) -> None:
    """Replace x, which was cut to +-TANH_LIMIT, by its tanh, within 2e-6 and never outside [-1, 1].

    square, top: scratch of the same shape.
    """
    np.multiply(x, x, square)
    np.multiply(square, _P3, top)
    np.add(top, _P2, top)
    np.multiply(top, square, top)
    np.add(top, _P1, top)
    np.multiply(top, square, top)
    np.add(top, _P0, top)
    np.multiply(top, x, top)
    np.multiply(square, _Q3, x)
    np.add(x, _Q2, x)
    np.multiply(x, square, x)
    np.add(x, _Q1, x)
    np.multiply(x, square, x)
    np.add(x, _Q0, x)
    np.divide(top, x, x)


def sigmoid_of_double(x: Float32, square: Float32, top: Float32) -> None:
    """Replace x, which was cut to +-TANH_LIMIT, by the sigmoid of 2 x, (1 + tanh(x)) / 2, within 1e-6."""
    tanh(x, square, top)
    np.multiply(x, _HALF, x)
    np.add(x, _HALF, x)


def exp(x: Float64) -> Float64:
    """Exponential of x <= 0, within 1e-11 of it; 0 below -700.

    x = k ln 2 + r with |r| <= ln 2 / 2, and exp(r) by the Pade approximant of order (4, 4), whose numerator is A + B
    and denominator A - B with A = 1680 + 180 r^2 + r^4 and B = r (840 + 20 r^2).
    """
    kept = x >= EXP_LOWEST
    x = np.maximum(x, EXP_LOWEST)
    k = np.rint(x * LOG2_E)
    r = x - k * LN2_HIGH - k * LN2_LOW
    square = r * r
    even = (square + 180.0) * square + 1680.0
    odd = (square * 20.0 + 840.0) * r
    power = ((k.astype(np.int64) + 1023) << 52).view(np.float64)  # 2**k
    return np.asarray((even + odd) / (even - odd) * power * kept)


def log(x: Float64) -> Float64:
    """Natural logarithm of finite x >= 1, within 1e-11.

    x = m 2^k with m in [sqrt(1/2), sqrt(2)); log m = 2 atanh(s) with s = (m - 1) / (m + 1), |s| < 0.172, by its series.
    """
    m, k = np.frexp(x)  # m in [0.5, 1)
    low = m < np.sqrt(0.5)
    m = np.where(low, m * 2.0, m)
    k = (k - low).astype(np.float64)
    s = (m - 1.0) / (m + 1.0)
    square = s * s
    series = np.full_like(square, 2.0 / 13.0)
    for power in (11.0, 9.0, 7.0, 5.0, 3.0):
        series = series * square + 2.0 / power
    return np.asarray(k * LN2_HIGH + (k * LN2_LOW + (series * square + 2.0) * s))
