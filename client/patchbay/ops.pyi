"""Functions over values of a trace. Written by `python -m patchbay.tracing.stubs`; not to be edited."""

# ruff: noqa: A001, E501, N801
from builtins import bool as _bool
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from patchbay.ir.dtypes import DType
from patchbay.tracing.proxy import Created, Proxy

#: A proxy, an array, a nested list or a number.
_Tensor: TypeAlias = Any
#: A `DType`, its name, or a dtype of numpy's.
_DTypeLike: TypeAlias = Any

__all__: list[str]

e: float
inf: float
nan: float
newaxis: None
pi: float

bool: DType
uint8: DType
int8: DType
int16: DType
int32: DType
int64: DType
float8_e4m3fn: DType
float8_e5m2: DType
float16: DType
bfloat16: DType
float32: DType
float64: DType

def abs(x: _Tensor) -> Proxy:
    """Absolute value."""

def acos(x: _Tensor) -> Proxy:
    """Inverse cosine, in radians."""

def acosh(x: _Tensor) -> Proxy:
    """Inverse hyperbolic cosine."""

def add(x1: _Tensor, x2: _Tensor) -> Proxy:
    """Sum x1 + x2 (logical or for bool)."""

def all(x: _Tensor, axis: int | Sequence[int] | None = None, keepdims: _bool = False) -> Proxy:
    """Whether every element is nonzero."""

def any(x: _Tensor, axis: int | Sequence[int] | None = None, keepdims: _bool = False) -> Proxy:
    """Whether any element is nonzero."""

def arange(start: float, stop: float | None = None, step: float = 1, dtype: _DTypeLike | None = None) -> Created:
    """Evenly spaced numbers from start up to, not including, stop."""

def argmax(x: _Tensor, axis: int | None = None, keepdims: _bool = False) -> Proxy:
    """Position of the largest element, the first among equals; int64."""

def argmin(x: _Tensor, axis: int | None = None, keepdims: _bool = False) -> Proxy:
    """Position of the smallest element, the first among equals; int64."""

def argsort(x: _Tensor, axis: int = -1, descending: _bool = False) -> Proxy:
    """Positions that put an axis in order, equal elements in theirs; int64."""

def asin(x: _Tensor) -> Proxy:
    """Inverse sine, in radians."""

def asinh(x: _Tensor) -> Proxy:
    """Inverse hyperbolic sine."""

def astype(x: _Tensor, dtype: _DTypeLike) -> Proxy:
    """x in another dtype."""

def atan(x: _Tensor) -> Proxy:
    """Inverse tangent, in radians."""

def atan2(x1: _Tensor, x2: _Tensor) -> Proxy:
    """Angle of the point (x2, x1), in radians."""

def atanh(x: _Tensor) -> Proxy:
    """Inverse hyperbolic tangent."""

def bitwise_and(x1: _Tensor, x2: _Tensor) -> Proxy:
    """Bits set in both."""

def bitwise_invert(x: _Tensor) -> Proxy:
    """Every bit flipped."""

def bitwise_left_shift(x1: _Tensor, x2: _Tensor) -> Proxy:
    """x1 shifted left by x2 bits."""

def bitwise_or(x1: _Tensor, x2: _Tensor) -> Proxy:
    """Bits set in either."""

def bitwise_right_shift(x1: _Tensor, x2: _Tensor) -> Proxy:
    """x1 shifted right by x2 bits, keeping its sign."""

def bitwise_xor(x1: _Tensor, x2: _Tensor) -> Proxy:
    """Bits set in exactly one."""

def broadcast_to(x: _Tensor, shape: int | Sequence[int]) -> Proxy:
    """Axes of extent 1 repeated to a shape."""

def ceil(x: _Tensor) -> Proxy:
    """Rounded towards plus infinity; integers stay as they are."""

def cholesky(x: _Tensor, upper: _bool = False) -> Proxy:
    """Triangular factor of positive definite matrices; others are an error."""

def clip(x: _Tensor, min: float | None = None, max: float | None = None) -> Proxy:
    """x held between two numbers."""

def concat(arrays: Sequence[_Tensor], axis: int | Sequence[int] = 0) -> Proxy:
    """Tensors joined along an axis."""

def cos(x: _Tensor) -> Proxy:
    """Cosine of radians."""

def cosh(x: _Tensor) -> Proxy:
    """Hyperbolic cosine."""

def cosine_similarity(x1: _Tensor, x2: _Tensor, axis: int = 1, eps: float = 1e-08) -> Proxy:
    """Cosine of the angle between vectors along an axis (torch.nn.functional.cosine_similarity)."""

def count_nonzero(x: _Tensor, axis: int | Sequence[int] | None = None, keepdims: _bool = False) -> Proxy:
    """How many elements are nonzero."""

def cross(x1: _Tensor, x2: _Tensor, axis: int = -1) -> Proxy:
    """Cross product along an axis of extent 3."""

def cross_entropy(
    input: _Tensor, target: _Tensor, reduction: str = "mean", axis: int | None = None, ignore_index: int = -100
) -> Proxy:
    """Negative log softmax of the target class (torch.nn.functional.cross_entropy)."""

def cumulative_prod(x: _Tensor, axis: int | None = None, dtype: _DTypeLike | None = None) -> Proxy:
    """Running product along an axis; int64 for integers and bool."""

def cumulative_sum(x: _Tensor, axis: int | None = None, dtype: _DTypeLike | None = None) -> Proxy:
    """Running sum along an axis; int64 for integers and bool."""

def det(x: _Tensor) -> Proxy:
    """Determinant."""

def diagonal(x: _Tensor, offset: int = 0) -> Proxy:
    """A diagonal of the last two axes (array API linalg.diagonal)."""

def divide(x1: _Tensor, x2: _Tensor) -> Proxy:
    """Quotient x1 / x2; float32 for integers and bool."""

class _eigh(NamedTuple):
    eigenvalues: Proxy
    eigenvectors: Proxy

def eigh(x: _Tensor) -> _eigh:
    """Eigenvalues, smallest first, and eigenvectors of symmetric matrices (their lower triangle is read)."""

def einsum(equation: str, *operands: _Tensor) -> Proxy:
    """Sums of products over named axes (torch.einsum), two operands at a time from the left."""

def elu(x: _Tensor, alpha: float = 1.0) -> Proxy:
    """x where positive, alpha * expm1(x) elsewhere (torch.nn.functional.elu)."""

def embedding(indices: _Tensor, weight: _Tensor) -> Proxy:
    """Rows of a matrix (torch.nn.functional.embedding)."""

def equal(x1: _Tensor, x2: _Tensor) -> Proxy:
    """x1 == x2."""

def erf(x: _Tensor) -> Proxy:
    """Error function (torch.erf)."""

def exp(x: _Tensor) -> Proxy:
    """e to the power x."""

def exp2(x: _Tensor) -> Proxy:
    """2 to the power x (torch.exp2)."""

def expand_dims(x: _Tensor, axis: int = 0) -> Proxy:
    """A new axis of extent 1."""

def expm1(x: _Tensor) -> Proxy:
    """exp(x) - 1, accurate near 0."""

def eye(n_rows: int, n_cols: int | None = None, k: int = 0, dtype: _DTypeLike | None = None) -> Created:
    """Ones on a diagonal, zeros elsewhere."""

def flip(x: _Tensor, axis: int | Sequence[int] | None = None) -> Proxy:
    """Axes reversed."""

def floor(x: _Tensor) -> Proxy:
    """Rounded towards minus infinity; integers stay as they are."""

def floor_divide(x1: _Tensor, x2: _Tensor) -> Proxy:
    """Quotient rounded towards minus infinity; integers divided by 0 give 0."""

def full(shape: int | Sequence[int], fill_value: float, dtype: _DTypeLike | None = None) -> Created:
    """One number everywhere."""

def gelu(x: _Tensor, approximate: str = "none") -> Proxy:
    """x times the normal distribution function of x (torch.nn.functional.gelu)."""

def greater(x1: _Tensor, x2: _Tensor) -> Proxy:
    """x1 > x2."""

def greater_equal(x1: _Tensor, x2: _Tensor) -> Proxy:
    """x1 >= x2."""

def hardtanh(x: _Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Proxy:
    """x held between two bounds (torch.nn.functional.hardtanh)."""

def heaviside(x1: _Tensor, x2: _Tensor) -> Proxy:
    """0 where x1 is negative, 1 where positive, x2 where zero (torch.heaviside); the step of JumpReLU."""

def inv(x: _Tensor) -> Proxy:
    """Inverse; a singular matrix is an error."""

def isfinite(x: _Tensor) -> Proxy:
    """True where x is neither NaN nor an infinity."""

def isinf(x: _Tensor) -> Proxy:
    """True where x is an infinity."""

def isnan(x: _Tensor) -> Proxy:
    """True where x is NaN."""

def kl_div(input: _Tensor, target: _Tensor, reduction: str = "mean", log_target: _bool = False) -> Proxy:
    """Kullback-Leibler divergence of the target from input, which holds log-probabilities (torch.nn.functional.kl_div)."""

def layer_norm(
    x: _Tensor,
    weight: _Tensor = None,
    bias: _Tensor = None,
    normalized_shape: int | Sequence[int] | None = None,
    eps: float = 1e-05,
) -> Proxy:
    """Mean taken off, divided by the standard deviation, then scaled and shifted (torch.nn.functional.layer_norm)."""

def leaky_relu(x: _Tensor, negative_slope: float = 0.01) -> Proxy:
    """x where positive, negative_slope * x elsewhere (torch.nn.functional.leaky_relu)."""

def less(x1: _Tensor, x2: _Tensor) -> Proxy:
    """x1 < x2."""

def less_equal(x1: _Tensor, x2: _Tensor) -> Proxy:
    """x1 <= x2."""

def linear(x: _Tensor, weight: _Tensor, bias: _Tensor = None) -> Proxy:
    """x @ weight.T + bias (torch.nn.functional.linear)."""

def linspace(start: float, stop: float, num: int, endpoint: _bool = True, dtype: _DTypeLike | None = None) -> Created:
    """Numbers evenly spaced between two ends."""

def log(x: _Tensor) -> Proxy:
    """Natural logarithm."""

def log10(x: _Tensor) -> Proxy:
    """Logarithm to base 10."""

def log1p(x: _Tensor) -> Proxy:
    """log(1 + x), accurate near 0."""

def log2(x: _Tensor) -> Proxy:
    """Logarithm to base 2."""

def log_sigmoid(x: _Tensor) -> Proxy:
    """log(sigmoid(x)) (torch.nn.functional.logsigmoid)."""

def log_softmax(x: _Tensor, axis: int = -1, dtype: _DTypeLike | None = None) -> Proxy:
    """Logarithm of softmax (torch.nn.functional.log_softmax)."""

def logaddexp(x1: _Tensor, x2: _Tensor) -> Proxy:
    """log(exp(x1) + exp(x2)), without overflow."""

def logical_and(x1: _Tensor, x2: _Tensor) -> Proxy:
    """True where both are nonzero."""

def logical_not(x: _Tensor) -> Proxy:
    """True where x is zero."""

def logical_or(x1: _Tensor, x2: _Tensor) -> Proxy:
    """True where either is nonzero."""

def logical_xor(x1: _Tensor, x2: _Tensor) -> Proxy:
    """True where exactly one is nonzero."""

def logsumexp(x: _Tensor, axis: int | Sequence[int] | None = None, keepdims: _bool = False) -> Proxy:
    """log of the sum of exp(x), without overflow (torch.logsumexp)."""

def masked_fill(x: _Tensor, mask: _Tensor, value: _Tensor) -> Proxy:
    """x with one number where the mask holds (torch.masked_fill)."""

def matmul(x1: _Tensor, x2: _Tensor) -> Proxy:
    """Matrix product x1 @ x2; leading axes broadcast."""

def matrix_norm(x: _Tensor, ord: str = "fro", keepdims: _bool = False) -> Proxy:
    """Norm of the matrices in the last two axes."""

def matrix_transpose(x: _Tensor) -> Proxy:
    """The last two axes swapped."""

def max(x: _Tensor, axis: int | Sequence[int] | None = None, keepdims: _bool = False) -> Proxy:
    """Largest element; NaN if any is NaN."""

def maximum(x1: _Tensor, x2: _Tensor) -> Proxy:
    """The larger one; NaN if either is NaN."""

def mean(x: _Tensor, axis: int | Sequence[int] | None = None, keepdims: _bool = False) -> Proxy:
    """Arithmetic mean."""

def min(x: _Tensor, axis: int | Sequence[int] | None = None, keepdims: _bool = False) -> Proxy:
    """Smallest element; NaN if any is NaN."""

def minimum(x1: _Tensor, x2: _Tensor) -> Proxy:
    """The smaller one; NaN if either is NaN."""

def moveaxis(x: _Tensor, source: int | Sequence[int], destination: int | Sequence[int]) -> Proxy:
    """Some axes moved, the others in their order."""

def mse_loss(input: _Tensor, target: _Tensor, reduction: str = "mean") -> Proxy:
    """Squared differences (torch.nn.functional.mse_loss)."""

def multiply(x1: _Tensor, x2: _Tensor) -> Proxy:
    """Product x1 * x2 (logical and for bool)."""

def nan_to_num(x: _Tensor, nan: float = 0.0, posinf: float | None = None, neginf: float | None = None) -> Proxy:
    """NaN and infinities replaced by numbers, by default 0 and the dtype's extremes (torch.nan_to_num)."""

def negative(x: _Tensor) -> Proxy:
    """-x."""

def nll_loss(
    input: _Tensor, target: _Tensor, reduction: str = "mean", axis: int | None = None, ignore_index: int = -100
) -> Proxy:
    """Negative of the target class's log-probability (torch.nn.functional.nll_loss)."""

def normalize(x: _Tensor, p: float = 2.0, axis: int = 1, eps: float = 1e-12) -> Proxy:
    """Divided by the p-norm along an axis (torch.nn.functional.normalize)."""

def not_equal(x1: _Tensor, x2: _Tensor) -> Proxy:
    """x1 != x2."""

def one_hot(x: _Tensor, num_classes: int) -> Proxy:
    """A new last axis that is 1 at the position that x names and 0 elsewhere; int64 (torch.nn.functional.one_hot)."""

def ones(shape: int | Sequence[int], dtype: _DTypeLike | None = None) -> Created:
    """Ones."""

def outer(x1: _Tensor, x2: _Tensor) -> Proxy:
    """All products of elements of two vectors."""

def pad(x: _Tensor, pad: Sequence[int], value: float = 0) -> Proxy:
    """A constant put around the tensor (torch.nn.functional.pad)."""

def permute_dims(x: _Tensor, axes: Sequence[int]) -> Proxy:
    """Axes in another order."""

def pinv(x: _Tensor, rtol: float | None = None) -> Proxy:
    """Moore-Penrose pseudo-inverse."""

def positive(x: _Tensor) -> Proxy:
    """x itself."""

def pow(x1: _Tensor, x2: _Tensor) -> Proxy:
    """x1 to the power x2; an integer to a negative power is truncated towards 0."""

def prod(
    x: _Tensor, axis: int | Sequence[int] | None = None, keepdims: _bool = False, dtype: _DTypeLike | None = None
) -> Proxy:
    """Product; int64 for integers and bool."""

class _qr(NamedTuple):
    q: Proxy
    r: Proxy

def qr(x: _Tensor, mode: str = "reduced") -> _qr:
    """Orthonormal q and upper triangular r with q @ r = x."""

def quick_gelu(x: _Tensor) -> Proxy:
    """x * sigmoid(1.702 x), as in CLIP."""

def reciprocal(x: _Tensor) -> Proxy:
    """1 / x."""

def relu(x: _Tensor) -> Proxy:
    """max(x, 0) (torch.nn.functional.relu)."""

def remainder(x1: _Tensor, x2: _Tensor) -> Proxy:
    """Remainder with the sign of x2; integers modulo 0 give 0."""

def repeat(x: _Tensor, repeats: int, axis: int | None = None) -> Proxy:
    """Each element repeated in place."""

def reshape(x: _Tensor, shape: int | Sequence[int]) -> Proxy:
    """The same elements in row-major order in another shape."""

def rms_norm(
    x: _Tensor, weight: _Tensor = None, normalized_shape: int | Sequence[int] | None = None, eps: float | None = None
) -> Proxy:
    """Divided by the root of the mean square, then scaled (torch.nn.functional.rms_norm)."""

def roll(x: _Tensor, shift: int | Sequence[int], axis: int | Sequence[int] | None = None) -> Proxy:
    """Elements moved along axes, the last ones coming in at the front."""

def round(x: _Tensor) -> Proxy:
    """Rounded to the nearest integer, halves to even; integers stay as they are."""

def rsqrt(x: _Tensor) -> Proxy:
    """1 / sqrt(x) (torch.rsqrt)."""

def scaled_dot_product_attention(
    query: _Tensor,
    key: _Tensor,
    value: _Tensor,
    attn_mask: _Tensor = None,
    is_causal: _bool = False,
    scale: float | None = None,
    enable_gqa: _bool = False,
) -> Proxy:
    """softmax(query @ key.T * scale + mask) @ value (torch.nn.functional.scaled_dot_product_attention)."""

def scatter_add(x: _Tensor, indices: _Tensor, source: _Tensor, axis: int = -1) -> Proxy:
    """x with source added at positions along an axis; repeated ones add up (torch.scatter_add)."""

def searchsorted(x1: _Tensor, x2: _Tensor, side: str = "left") -> Proxy:
    """Where elements of x2 would go in the sorted x1; int64."""

def set_index(x: Proxy, index: Any, value: _Tensor, mode: str = "set") -> Proxy:
    """A copy of x in which x[index] is replaced by value (mode "set"), or has it added ("add") or multiplied ("mul")."""

def sigmoid(x: _Tensor) -> Proxy:
    """1 / (1 + exp(-x)) (torch.sigmoid)."""

def sign(x: _Tensor) -> Proxy:
    """-1, 0 or 1 by sign; NaN stays NaN."""

def silu(x: _Tensor) -> Proxy:
    """x * sigmoid(x) (torch.nn.functional.silu)."""

def sin(x: _Tensor) -> Proxy:
    """Sine of radians."""

def sinh(x: _Tensor) -> Proxy:
    """Hyperbolic sine."""

class _slogdet(NamedTuple):
    sign: Proxy
    logabsdet: Proxy

def slogdet(x: _Tensor) -> _slogdet:
    """Sign and logarithm of the absolute determinant."""

def softmax(x: _Tensor, axis: int = -1, dtype: _DTypeLike | None = None) -> Proxy:
    """Exponentials that sum to 1 along an axis (torch.nn.functional.softmax)."""

def softplus(x: _Tensor, beta: float = 1.0, threshold: float = 20.0) -> Proxy:
    """log(1 + exp(beta x)) / beta, and x itself above the threshold (torch.nn.functional.softplus)."""

def solve(x1: _Tensor, x2: _Tensor) -> Proxy:
    """The x with x1 @ x = x2; a singular matrix is an error."""

def sort(x: _Tensor, axis: int = -1, descending: _bool = False) -> Proxy:
    """Elements in order along an axis; NaN counts as largest."""

def sqrt(x: _Tensor) -> Proxy:
    """Square root."""

def square(x: _Tensor) -> Proxy:
    """x * x."""

def squeeze(x: _Tensor, axis: int | Sequence[int]) -> Proxy:
    """Axes of extent 1 removed."""

def stack(arrays: Sequence[_Tensor], axis: int = 0) -> Proxy:
    """Tensors of one shape joined along a new axis."""

def std(x: _Tensor, axis: int | Sequence[int] | None = None, keepdims: _bool = False, correction: float = 0.0) -> Proxy:
    """Standard deviation."""

def stop_gradient(x: _Tensor) -> Proxy:
    """x itself, taken as a constant when differentiated (jax.lax.stop_gradient)."""

def subtract(x1: _Tensor, x2: _Tensor) -> Proxy:
    """Difference x1 - x2."""

def sum(
    x: _Tensor, axis: int | Sequence[int] | None = None, keepdims: _bool = False, dtype: _DTypeLike | None = None
) -> Proxy:
    """Sum; int64 for integers and bool."""

class _svd(NamedTuple):
    u: Proxy
    s: Proxy
    vh: Proxy

def svd(x: _Tensor, full_matrices: _bool = True) -> _svd:
    """Singular values s, largest first, with u @ diag(s) @ vh = x."""

def svdvals(x: _Tensor) -> Proxy:
    """Singular values, largest first."""

def swapaxes(x: _Tensor, axis1: int, axis2: int) -> Proxy:
    """Two axes swapped (numpy.swapaxes)."""

def take(x: _Tensor, indices: _Tensor, axis: int | None = None) -> Proxy:
    """Positions along an axis, in the order and shape of the indices; negative ones count from the end."""

def take_along_axis(x: _Tensor, indices: _Tensor, axis: int = -1) -> Proxy:
    """For every place off the axis, its own positions along it (torch.gather, with broadcasting)."""

def tan(x: _Tensor) -> Proxy:
    """Tangent of radians."""

def tanh(x: _Tensor) -> Proxy:
    """Hyperbolic tangent."""

def tensordot(x1: _Tensor, x2: _Tensor, axes: int | tuple[Sequence[int], Sequence[int]] = 2) -> Proxy:
    """Sums of products over axes: the last of x1 with the first of x2, or a tuple (axes of x1, axes of x2)."""

def tile(x: _Tensor, repetitions: int | Sequence[int]) -> Proxy:
    """The tensor repeated as a whole."""

class _topk(NamedTuple):
    values: Proxy
    indices: Proxy

def topk(x: _Tensor, k: int, axis: int = -1, largest: _bool = True) -> _topk:
    """The k largest or smallest elements along an axis, in order, and their positions (torch.topk)."""

def trace(x: _Tensor) -> Proxy:
    """Sum of the main diagonal; int64 for integers."""

def tril(x: _Tensor, k: int = 0) -> Proxy:
    """The lower triangle of the last two axes; zero above it."""

def triu(x: _Tensor, k: int = 0) -> Proxy:
    """The upper triangle of the last two axes; zero below it."""

def trunc(x: _Tensor) -> Proxy:
    """Rounded towards zero; integers stay as they are."""

def unfold(x: _Tensor, axis: int, size: int, step: int = 1) -> Proxy:
    """Windows along an axis, as a new last axis (torch.Tensor.unfold)."""

def var(x: _Tensor, axis: int | Sequence[int] | None = None, keepdims: _bool = False, correction: float = 0.0) -> Proxy:
    """Variance."""

def vecdot(x1: _Tensor, x2: _Tensor, axis: int = -1) -> Proxy:
    """Sum of products along an axis."""

def vector_norm(
    x: _Tensor, axis: int | Sequence[int] | None = None, keepdims: _bool = False, ord: float = 2.0
) -> Proxy:
    """The ord-norm of the elements (array API linalg.vector_norm)."""

def where(condition: _Tensor, x1: _Tensor, x2: _Tensor) -> Proxy:
    """x1 where the condition holds, x2 elsewhere."""

def zeros(shape: int | Sequence[int], dtype: _DTypeLike | None = None) -> Created:
    """Zeros."""
