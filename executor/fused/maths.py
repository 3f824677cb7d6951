"""exp and the normal distribution as branch-free polynomials: compilers vectorise these, and libm calls they do not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import overload

from executor.fused.compile import EXACT, exact_helper, intrinsic


@intrinsic  # type: ignore[untyped-decorator]
def _bits_of(typing_context: Any, value: Any) -> Any:
    """Reinterpret a float as a signed integer of the same width."""
    result: Any = types.int32 if value == types.float32 else types.int64

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(result.bitwidth))

    return result(value), generate


@intrinsic  # type: ignore[untyped-decorator]
def _float_of(typing_context: Any, value: Any) -> Any:
    """Reinterpret a signed integer as a float of the same width."""
    result: Any = types.float32 if value == types.int32 else types.float64

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType() if result == types.float32 else ir.DoubleType())

    return result(value), generate


@intrinsic  # type: ignore[untyped-decorator]
def larger(typing_context: Any, left: Any, right: Any) -> Any:
    """The larger of two floats, either if one is NaN: without that licence a maximum over a row does not vectorise."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        flags = ("nnan", "nsz")
        above = builder.fcmp_ordered(">", *arguments, flags=flags)
        return builder.select(above, *arguments, flags=flags)

    return left(left, right), generate


def polynomial(coefficients: tuple[float, ...]) -> Any:
    """Make a compiled function for Σ coefficients[i] x^i: Horner's rule as straight-line fused multiply-adds."""

    def evaluate(typing_context: Any, x: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            (value,) = arguments
            terms = [ir.Constant(value.type, c) for c in reversed(coefficients)]
            total = terms[0]
            for term in terms[1:]:
                total = builder.fadd(builder.fmul(total, value, flags=("contract",)), term, flags=("contract",))
            return total

        return x(x), generate

    return intrinsic(evaluate)


# exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln(2) / 2 (Cody & Waite 1980). Adding 1.5 · 2^(mantissa bits) rounds
# to an integer and leaves that integer in the low bits of the sum, so that 2^n is one addition and one shift.
# float32: the polynomial of Moshier's Cephes expf. float64: Taylor terms to r^13 / 13!, remainder below 5e-18.

_cephes = polynomial(
    (5.0000001201e-1, 1.6666665459e-1, 4.1665795894e-2, 8.3334519073e-3, 1.3981999507e-3, 1.9875691500e-4)
)
_taylor = polynomial(tuple(1.0 / math.factorial(i) for i in range(14)))


@exact_helper
def _exp_float32(x: Any) -> Any:
    lowest, highest = np.float32(-87.33654), np.float32(88.72283)
    bounded = lowest if x < lowest else x
    bounded = highest if bounded > highest else bounded
    shifted = bounded * np.float32(1.44269504088896341) + np.float32(12582912.0)
    n = shifted - np.float32(12582912.0)
    r = bounded - n * np.float32(0.693359375)
    r = r - n * np.float32(-2.12194440e-4)
    p = _cephes(r) * (r * r) + r + np.float32(1.0)
    half_power = _float_of(np.int32((np.int32(_bits_of(shifted) + np.int32(126))) << np.int32(23)))
    result = np.float32(2.0) * p * half_power  # 2^(n-1), because 2^128 does not exist
    return np.float32(0.0) if x < lowest else result


@exact_helper
def _exp_float64(x: Any) -> Any:
    lowest, highest = -708.39, 709.78
    bounded = lowest if x < lowest else x
    bounded = highest if bounded > highest else bounded
    shifted = bounded * 1.4426950408889634074 + 6755399441055744.0
    n = shifted - 6755399441055744.0
    r = bounded - n * 6.93145751953125e-1
    r = r - n * 1.42860682030941723212e-6
    half_power = _float_of((_bits_of(shifted) + np.int64(1022)) << np.int64(52))
    result = 2.0 * _taylor(r) * half_power
    return 0.0 if x < lowest else result


# The upper tail of the normal distribution, Q(a) = exp(-a²/2) · P(t) / (a + k) with t = (a - k) / (a + k) in [-1, 1):
# the smooth factor erfcx(a / sqrt 2) (a + k) / 2 has a short Chebyshev expansion in t (Shepherd & Laframboise 1981,
# Math. Comp. 36, 249-253). Coefficients of t^0, t^1, ...; relative error 4e-8 (k = 4) and 2e-15 (k = 4.75).
_tail_float32 = polynomial(
    (
        0.7552851252691557,
        -0.6078963906894261,
        0.3871376276169876,
        -0.1865269227084538,
        0.06039495660426176,
        -0.007511374811280805,
        -0.0034756078570889978,
        0.001562552070849711,
        0.00012903942281941214,
        -0.000156740115357261,
    )
)
_tail_float64 = polynomial(
    (
        0.7664162921392201,
        -0.6535893313078319,
        0.47206334900332153,
        -0.2841845199277055,
        0.13812537703521444,
        -0.05061383111437678,
        0.01144064214574513,
        0.00010629518998179086,
        -0.0011377223708022577,
        0.00029482910813736146,
        6.507459648473432e-05,
        -4.8309423516429955e-05,
        -1.6597855723596025e-06,
        6.907964128781191e-06,
        -2.703682618449294e-07,
        -1.0476556820555293e-06,
        6.966080846867685e-08,
        1.7119802042401957e-07,
        -1.545999765465919e-08,
        -2.6451767345539672e-08,
        4.371193744581823e-09,
        2.621328049065108e-09,
        -7.666376657695279e-10,
    )
)


@exact_helper
def _normal_float32(x: Any) -> Any:
    limit, k = np.float32(13.0), np.float32(4.0)
    a = abs(x)
    a = limit if a > limit else a
    e = _exp_float32(np.float32(-0.5) * a * a)
    s = np.float32(1.0) / (a + k)
    t = np.float32(1.0) - np.float32(8.0) * s
    tail = e * s * _tail_float32(t)
    below = np.float32(1.0) - tail if x > np.float32(0.0) else tail
    return below, a * e * np.float32(0.3989422804014327)


@exact_helper
def _normal_float64(x: Any) -> Any:
    a = abs(x)
    a = 37.0 if a > 37.0 else a
    e = _exp_float64(-0.5 * a * a)
    s = 1.0 / (a + 4.75)
    t = 1.0 - 9.5 * s
    tail = e * s * _tail_float64(t)
    below = 1.0 - tail if x > 0.0 else tail
    return below, a * e * 0.3989422804014327


def exp(x: Any) -> Any:
    """e^x to 2 units in the last place; 0 below the smallest normal number, saturated above the largest; NaN stays."""
    raise NotImplementedError("only compiled code calls this")


def normal(x: Any) -> tuple[Any, Any]:
    """(Φ(x), |x| φ(x)) of the standard normal distribution; |x| saturates where the density is 0 in this precision."""
    raise NotImplementedError("only compiled code calls this")


def _choose(name: str, single: Callable[[Any], Any], double: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def by_type(x: Any) -> Callable[[Any], Any]:
        function = single if x == types.float32 else double

        def implementation(x: Any) -> Any:
            return function(x)

        return implementation

    by_type.__name__ = name
    return by_type


overload(exp, jit_options={"fastmath": EXACT, "forceinline": True})(_choose("exp", _exp_float32, _exp_float64))
overload(normal, jit_options={"fastmath": EXACT, "forceinline": True})(
    _choose("normal", _normal_float32, _normal_float64)
)
