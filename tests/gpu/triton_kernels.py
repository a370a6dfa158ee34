"""Triton kernels for check_kernels.py: one for each way in which an argument can reach a kernel."""

import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["TensorDescriptor", "add", "copy_tile", "dependent", "nothing", "scalars", "tuples"]


@triton.jit
def add(left, right, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    tl.store(out + at, tl.load(left + at, mask) + tl.load(right + at, mask), mask)


@triton.jit
def scalars(
    whole, real, small, large, unsigned, flag, number, half: tl.float16, brain: tl.bfloat16, double: tl.float64
):
    tl.store(whole, small)
    tl.store(whole + 1, large)
    tl.store(whole + 2, unsigned.to(tl.int64, bitcast=True))
    tl.store(whole + 3, tl.where(flag, 7, 8))
    tl.store(real, number)
    tl.store(real + 1, half)
    tl.store(real + 2, brain)
    tl.store(real + 3, double)


@triton.jit
def tuples(pairs, nested, out):
    tl.store(out, tl.load(pairs[0]) * pairs[1] + nested[0][0] + nested[1])


@triton.jit
def copy_tile(source, target, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS
    column = tl.program_id(1) * COLUMNS
    target.store([row, column], source.load([row, column]))


@triton.jit
def dependent(left, out, count, BLOCK: tl.constexpr):
    tl.extra.cuda.gdc_wait()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < count
    tl.store(out + at, tl.load(left + at, mask) * 2, mask)
    tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def nothing(a, b, c, d, m, n, k, scale):
    pass
