"""Elementary functions from +, -, * and / alone, so that every machine and implementation gets the same bits.

The exp or tanh of a library differs in its last bits between processors, between versions, and even between the middle
and the end of one array. IEEE 754 defines the results of the four operations and of rounding to the bit. So the bits
are the same everywhere if the operations are done in the same order and without fused multiply-adds. Another
implementation of these functions (`native/src/arithmetic.inc`) must use the same order and constants.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from service.arrays import Float32, Float64

# Version of the arithmetic: of everything except the quantised weights that decides the bits of a text. It is part of
# the fingerprint.
VERSION = 1


@dataclass(frozen=True)
class Activation:
    """An activation as a rational function of y = scale * x, where y is clipped to +-limit:

        offset + y (y^4 + p1 y^2 + p0) / (y^6 + q2 y^4 + q1 y^2 + q0)

    The coefficients are a minimax fit. The scale makes both leading coefficients 1, which saves two of eleven
    operations; it is part of weights, which are multiplied anyway.
    """

    scale: float
    limit: float
    p: tuple[float, float]
    q: tuple[float, float, float]
    offset: float
    error: float  # largest absolute error; clipping causes half of it


TANH = Activation(
    scale=0.03646614323446821,
    limit=0.22609008848667145,
    p=(0.0012025685282424092, 0.10315920412540436),
    q=(4.385459396871738e-05, 0.014751113951206207, 0.42995548248291016),
    offset=0.0,
    error=1.7e-5,
)
SIGMOID = Activation(
    scale=0.07293228646893642 / 2,
    limit=0.4521801769733429,
    p=(0.019241096451878548, 0.41263681650161743),
    q=(0.0028066940139979124, 0.23601782321929932, 1.7198219299316406),
    offset=0.5,
    error=8.5e-6,
)

LOG2_E = 1.4426950408889634
LN2 = 0.6931471805599453
EXP_LOWEST = -700.0  # smaller arguments are replaced by this: the difference is lost in a float64 sum of probabilities
EXP_ERROR = 1e-8  # largest relative error of exp
LOG_ERROR = 1e-11  # largest absolute error of log

# 0-d arrays: numpy takes half as long for an operation with one as with a Python number.
_CONSTANTS = {
    activation: tuple(np.array(value, np.float32) for value in (*activation.p, *activation.q, activation.offset))
    for activation in (TANH, SIGMOID)
}


def activate(activation: Activation, y: Float32, square: Float32, top: Float32) -> None:
    """Replace y = scale * x, clipped to +-limit, by the activation of x. square and top are scratch of y's shape."""
    p0, p1, q0, q1, q2, offset = _CONSTANTS[activation]
    np.multiply(y, y, square)
    np.add(square, p1, top)
    np.multiply(top, square, top)
    np.add(top, p0, top)
    np.multiply(top, y, top)
    np.add(square, q2, y)
    np.multiply(y, square, y)
    np.add(y, q1, y)
    np.multiply(y, square, y)
    np.add(y, q0, y)
    np.divide(top, y, y)
    if activation.offset:
        np.add(y, offset, y)


def exp(x: Float64) -> Float64:
    """Return the exponential of x <= 0, with a relative error of at most 1e-8. Overwrites x.

    Arguments below -700 are treated as -700.

    x = k ln 2 + r with |r| <= ln 2 / 2, and exp(r) by the Pade approximant of order (3, 3), whose numerator is A + B
    and denominator A - B with A = 120 + 12 r^2 and B = r (60 + r^2).
    """
    np.maximum(x, EXP_LOWEST, out=x)
    k = np.rint(x * LOG2_E)
    x -= k * LN2
    square = x * x
    even = square * 12.0
    even += 120.0
    square += 60.0
    square *= x  # the odd part
    top = even + square
    even -= square
    top /= even
    return np.asarray(np.ldexp(top, k.astype(np.int32)))


def log(x: Float64) -> Float64:
    """Return the natural logarithm of finite x >= 1, with an absolute error of at most 1e-11.

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
    return np.asarray(k * LN2 + (series * square + 2.0) * s)
