"""Activation functions in float32, of tl.exp alone: the interpreter and every GPU have it."""

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
