"""Activation functions in float32, of tl.exp and tl.erf alone: the interpreter and every GPU have them."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Relative error of a few roundings, also near zero, where 1 - e^(-2|x|) would cancel."""
    magnitude = tl.abs(x)
    e = tl.exp(-2.0 * magnitude)
    far = (1.0 - e) / (1.0 + e)
    square = x * x
    # The Taylor series up to x^11, whose next term is below 2^-24 of x for |x| < 0.25.
    series = 62.0 / 2835.0 + square * (-1382.0 / 155925.0)
    series = -1.0 / 3.0 + square * (2.0 / 15.0 + square * (-17.0 / 315.0 + square * series))
    return tl.where(magnitude < 0.25, x + x * square * series, tl.where(x < 0, -far, far))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


TANH, SWISH, RELU, GELU = (tl.constexpr(i) for i in range(4))


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """The activation and its slope; what is not used of them costs nothing. NaN stays NaN."""
    if ACTIVATION == TANH:
        value = tanh(x)
        slope = 1.0 - value * value
    elif ACTIVATION == SWISH:
        s = sigmoid(x)
        value = x * s
        slope = s + value * (1.0 - s)
    elif ACTIVATION == RELU:
        value = tl.where(x < 0.0, 0.0, x)
        slope = tl.where(x > 0.0, 1.0, 0.0)
    else:
        cdf = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        value = x * cdf
        slope = cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return value, slope
