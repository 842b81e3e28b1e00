"""Methods of values, sites of runs. Made by `python -m patchbay.tracing.stubs`; not to be edited."""

# ruff: noqa: E501
from builtins import bool as _bool
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias, overload

from patchbay.ops import _eigh as _eigh
from patchbay.ops import _qr as _qr
from patchbay.ops import _slogdet as _slogdet
from patchbay.ops import _svd as _svd
from patchbay.ops import _topk as _topk
from patchbay.tracing.namespaces import NumberedNamespace, SiteNamespace
from patchbay.tracing.proxy import Proxy

#: A proxy, an array, a nested list or a number.
_Tensor: TypeAlias = Any
#: A `DType`, its name, or a dtype of numpy's.
_DTypeLike: TypeAlias = Any

class Site:
    """A site: to read it gives its value, to assign to it writes there."""

    @overload
    def __get__(self, instance: None, owner: Any) -> Site: ...
    @overload
    def __get__(self, instance: object, owner: Any) -> Proxy: ...
    def __set__(self, instance: object, value: Any) -> None: ...

class Methods:
    """The operations of values."""

    def abs(self) -> Proxy:
        """Absolute value."""

    def acos(self) -> Proxy:
        """Inverse cosine, in radians."""

    def acosh(self) -> Proxy:
        """Inverse hyperbolic cosine."""

    def add(self, x2: _Tensor) -> Proxy:
        """Sum x1 + x2 (logical or for bool)."""

    def all(self, axis: int | Sequence[int] | None = None, keepdims: _bool = False) -> Proxy:
        """Whether every element is nonzero."""

    def any(self, axis: int | Sequence[int] | None = None, keepdims: _bool = False) -> Proxy:
        """Whether any element is nonzero."""

    def argmax(self, axis: int | None = None, keepdims: _bool = False) -> Proxy:
        """Position of the largest element, the first among equals; int64."""

    def argmin(self, axis: int | None = None, keepdims: _bool = False) -> Proxy:
        """Position of the smallest element, the first among equals; int64."""

    def argsort(self, axis: int = -1, descending: _bool = False) -> Proxy:
        """Positions that put an axis in order, equal elements in theirs; int64."""

    def asin(self) -> Proxy:
        """Inverse sine, in radians."""

    def asinh(self) -> Proxy:
        """Inverse hyperbolic sine."""

    def astype(self, dtype: _DTypeLike) -> Proxy:
        """x in another dtype."""

    def atan(self) -> Proxy:
        """Inverse tangent, in radians."""

    def atan2(self, x2: _Tensor) -> Proxy:
        """Angle of the point (x2, x1), in radians."""

    def atanh(self) -> Proxy:
        """Inverse hyperbolic tangent."""

    def bitwise_and(self, x2: _Tensor) -> Proxy:
        """Bits set in both."""

    def bitwise_invert(self) -> Proxy:
        """Every bit flipped."""

    def bitwise_left_shift(self, x2: _Tensor) -> Proxy:
        """x1 shifted left by x2 bits."""

    def bitwise_or(self, x2: _Tensor) -> Proxy:
        """Bits set in either."""

    def bitwise_right_shift(self, x2: _Tensor) -> Proxy:
        """x1 shifted right by x2 bits, keeping its sign."""

    def bitwise_xor(self, x2: _Tensor) -> Proxy:
        """Bits set in exactly one."""

    def broadcast_to(self, *shape: int | Sequence[int]) -> Proxy:
        """Axes of extent 1 repeated to a shape."""

    def ceil(self) -> Proxy:
        """Rounded towards plus infinity; integers stay as they are."""

    def cholesky(self, upper: _bool = False) -> Proxy:
        """Triangular factor of positive definite matrices; others are an error."""

    def clip(self, min: float | None = None, max: float | None = None) -> Proxy:
        """x held between two numbers."""

    def cos(self) -> Proxy:
        """Cosine of radians."""

    def cosh(self) -> Proxy:
        """Hyperbolic cosine."""

    def cosine_similarity(self, x2: _Tensor, axis: int = 1, eps: float = 1e-08) -> Proxy:
        """Cosine of the angle between vectors along an axis (torch.nn.functional.cosine_similarity)."""

    def count_nonzero(self, axis: int | Sequence[int] | None = None, keepdims: _bool = False) -> Proxy:
        """How many elements are nonzero."""

    def cross(self, x2: _Tensor, axis: int = -1) -> Proxy:
        """Cross product along an axis of extent 3."""

    def cross_entropy(
        self, target: _Tensor, reduction: str = "mean", axis: int | None = None, ignore_index: int = -100
    ) -> Proxy:
        """Negative log softmax of the target class (torch.nn.functional.cross_entropy)."""

    def cumulative_prod(self, axis: int | None = None, dtype: _DTypeLike | None = None) -> Proxy:
        """Running product along an axis; int64 for integers and bool."""

    def cumulative_sum(self, axis: int | None = None, dtype: _DTypeLike | None = None) -> Proxy:
        """Running sum along an axis; int64 for integers and bool."""

    def det(self) -> Proxy:
        """Determinant."""

    def diagonal(self, offset: int = 0) -> Proxy:
        """A diagonal of the last two axes (array API linalg.diagonal)."""

    def divide(self, x2: _Tensor) -> Proxy:
        """Quotient x1 / x2; float32 for integers and bool."""

    def eigh(self) -> _eigh:
        """Eigenvalues, smallest first, and eigenvectors of symmetric matrices (their lower triangle is read)."""

    def elu(self, alpha: float = 1.0) -> Proxy:
        """x where positive, alpha * expm1(x) elsewhere (torch.nn.functional.elu)."""

    def equal(self, x2: _Tensor) -> Proxy:
        """x1 == x2."""

    def erf(self) -> Proxy:
        """Error function (torch.erf)."""

    def exp(self) -> Proxy:
        """e to the power x."""

    def exp2(self) -> Proxy:
        """2 to the power x (torch.exp2)."""

    def expand_dims(self, axis: int = 0) -> Proxy:
        """A new axis of extent 1."""

    def expm1(self) -> Proxy:
        """exp(x) - 1, accurate near 0."""

    def flip(self, axis: int | Sequence[int] | None = None) -> Proxy:
        """Axes reversed."""

    def floor(self) -> Proxy:
        """Rounded towards minus infinity; integers stay as they are."""

    def floor_divide(self, x2: _Tensor) -> Proxy:
        """Quotient rounded towards minus infinity; integers divided by 0 give 0."""

    def gelu(self, approximate: str = "none") -> Proxy:
        """x times the normal distribution function of x (torch.nn.functional.gelu)."""

    def greater(self, x2: _Tensor) -> Proxy:
        """x1 > x2."""

    def greater_equal(self, x2: _Tensor) -> Proxy:
        """x1 >= x2."""

    def hardtanh(self, min_val: float = -1.0, max_val: float = 1.0) -> Proxy:
        """x held between two bounds (torch.nn.functional.hardtanh)."""

    def heaviside(self, x2: _Tensor) -> Proxy:
        """0 where x1 is negative, 1 where positive, x2 where zero (torch.heaviside); the step of JumpReLU."""

    def inv(self) -> Proxy:
        """Inverse; a singular matrix is an error."""

    def isfinite(self) -> Proxy:
        """True where x is neither NaN nor an infinity."""

    def isinf(self) -> Proxy:
        """True where x is an infinity."""

    def isnan(self) -> Proxy:
        """True where x is NaN."""

    def kl_div(self, target: _Tensor, reduction: str = "mean", log_target: _bool = False) -> Proxy:
        """Kullback-Leibler divergence of the target from input, which holds log-probabilities (torch.nn.functional.kl_div)."""

    def layer_norm(
        self,
        weight: _Tensor = None,
        bias: _Tensor = None,
        normalized_shape: int | Sequence[int] | None = None,
        eps: float = 1e-05,
    ) -> Proxy:
        """Mean taken off, divided by the standard deviation, then scaled and shifted (torch.nn.functional.layer_norm)."""

    def leaky_relu(self, negative_slope: float = 0.01) -> Proxy:
        """x where positive, negative_slope * x elsewhere (torch.nn.functional.leaky_relu)."""

    def less(self, x2: _Tensor) -> Proxy:
        """x1 < x2."""

    def less_equal(self, x2: _Tensor) -> Proxy:
        """x1 <= x2."""

    def linear(self, weight: _Tensor, bias: _Tensor = None) -> Proxy:
        """x @ weight.T + bias (torch.nn.functional.linear)."""

    def log(self) -> Proxy:
        """Natural logarithm."""

    def log10(self) -> Proxy:
        """Logarithm to base 10."""

    def log1p(self) -> Proxy:
        """log(1 + x), accurate near 0."""

    def log2(self) -> Proxy:
        """Logarithm to base 2."""

    def log_sigmoid(self) -> Proxy:
        """log(sigmoid(x)) (torch.nn.functional.logsigmoid)."""

    def log_softmax(self, axis: int = -1, dtype: _DTypeLike | None = None) -> Proxy:
        """Logarithm of softmax (torch.nn.functional.log_softmax)."""

    def logaddexp(self, x2: _Tensor) -> Proxy:
        """log(exp(x1) + exp(x2)), without overflow."""

    def logical_and(self, x2: _Tensor) -> Proxy:
        """True where both are nonzero."""

    def logical_not(self) -> Proxy:
        """True where x is zero."""

    def logical_or(self, x2: _Tensor) -> Proxy:
        """True where either is nonzero."""

    def logical_xor(self, x2: _Tensor) -> Proxy:
        """True where exactly one is nonzero."""

    def logsumexp(self, axis: int | Sequence[int] | None = None, keepdims: _bool = False) -> Proxy:
        """log of the sum of exp(x), without overflow (torch.logsumexp)."""

    def masked_fill(self, mask: _Tensor, value: _Tensor) -> Proxy:
        """x with one number where the mask holds (torch.masked_fill)."""

    def matmul(self, x2: _Tensor) -> Proxy:
        """Matrix product x1 @ x2; leading axes broadcast."""

    def matrix_norm(self, ord: str = "fro", keepdims: _bool = False) -> Proxy:
        """Norm of the matrices in the last two axes."""

    def matrix_transpose(self) -> Proxy:
        """The last two axes swapped."""

    def max(self, axis: int | Sequence[int] | None = None, keepdims: _bool = False) -> Proxy:
        """Largest element; NaN if any is NaN."""

    def maximum(self, x2: _Tensor) -> Proxy:
        """The larger one; NaN if either is NaN."""

    def mean(self, axis: int | Sequence[int] | None = None, keepdims: _bool = False) -> Proxy:
        """Arithmetic mean."""

    def min(self, axis: int | Sequence[int] | None = None, keepdims: _bool = False) -> Proxy:
        """Smallest element; NaN if any is NaN."""

    def minimum(self, x2: _Tensor) -> Proxy:
        """The smaller one; NaN if either is NaN."""

    def moveaxis(self, source: int | Sequence[int], destination: int | Sequence[int]) -> Proxy:
        """Some axes moved, the others in their order."""

    def mse_loss(self, target: _Tensor, reduction: str = "mean") -> Proxy:
        """Squared differences (torch.nn.functional.mse_loss)."""

    def multiply(self, x2: _Tensor) -> Proxy:
        """Product x1 * x2 (logical and for bool)."""

    def nan_to_num(self, nan: float = 0.0, posinf: float | None = None, neginf: float | None = None) -> Proxy:
        """NaN and infinities replaced by numbers, by default 0 and the dtype's extremes (torch.nan_to_num)."""

    def negative(self) -> Proxy:
        """-x."""

    def nll_loss(
        self, target: _Tensor, reduction: str = "mean", axis: int | None = None, ignore_index: int = -100
    ) -> Proxy:
        """Negative of the target class's log-probability (torch.nn.functional.nll_loss)."""

    def normalize(self, p: float = 2.0, axis: int = 1, eps: float = 1e-12) -> Proxy:
        """Divided by the p-norm along an axis (torch.nn.functional.normalize)."""

    def not_equal(self, x2: _Tensor) -> Proxy:
        """x1 != x2."""

    def one_hot(self, num_classes: int) -> Proxy:
        """A new last axis that is 1 at the position that x names and 0 elsewhere; int64 (torch.nn.functional.one_hot)."""

    def outer(self, x2: _Tensor) -> Proxy:
        """All products of elements of two vectors."""

    def pad(self, pad: Sequence[int], value: float = 0) -> Proxy:
        """A constant put around the tensor (torch.nn.functional.pad)."""

    def permute_dims(self, *axes: int | Sequence[int]) -> Proxy:
        """Axes in another order."""

    def pinv(self, rtol: float | None = None) -> Proxy:
        """Moore-Penrose pseudo-inverse."""

    def positive(self) -> Proxy:
        """x itself."""

    def pow(self, x2: _Tensor) -> Proxy:
        """x1 to the power x2; an integer to a negative power is truncated towards 0."""

    def prod(
        self, axis: int | Sequence[int] | None = None, keepdims: _bool = False, dtype: _DTypeLike | None = None
    ) -> Proxy:
        """Product; int64 for integers and bool."""

    def qr(self, mode: str = "reduced") -> _qr:
        """Orthonormal q and upper triangular r with q @ r = x."""

    def quick_gelu(self) -> Proxy:
        """x * sigmoid(1.702 x), as in CLIP."""

    def reciprocal(self) -> Proxy:
        """1 / x."""

    def relu(self) -> Proxy:
        """max(x, 0) (torch.nn.functional.relu)."""

    def remainder(self, x2: _Tensor) -> Proxy:
        """Remainder with the sign of x2; integers modulo 0 give 0."""

    def repeat(self, repeats: int, axis: int | None = None) -> Proxy:
        """Each element repeated in place."""

    def reshape(self, *shape: int | Sequence[int]) -> Proxy:
        """The same elements in row-major order in another shape."""

    def rms_norm(
        self, weight: _Tensor = None, normalized_shape: int | Sequence[int] | None = None, eps: float | None = None
    ) -> Proxy:
        """Divided by the root of the mean square, then scaled (torch.nn.functional.rms_norm)."""

    def roll(self, shift: int | Sequence[int], axis: int | Sequence[int] | None = None) -> Proxy:
        """Elements moved along axes, the last ones coming in at the front."""

    def round(self) -> Proxy:
        """Rounded to the nearest integer, halves to even; integers stay as they are."""

    def rsqrt(self) -> Proxy:
        """1 / sqrt(x) (torch.rsqrt)."""

    def scaled_dot_product_attention(
        self,
        key: _Tensor,
        value: _Tensor,
        attn_mask: _Tensor = None,
        is_causal: _bool = False,
        scale: float | None = None,
        enable_gqa: _bool = False,
    ) -> Proxy:
        """softmax(query @ key.T * scale + mask) @ value (torch.nn.functional.scaled_dot_product_attention)."""

    def scatter_add(self, indices: _Tensor, source: _Tensor, axis: int = -1) -> Proxy:
        """x with source added at positions along an axis; repeated ones add up (torch.scatter_add)."""

    def searchsorted(self, x2: _Tensor, side: str = "left") -> Proxy:
        """Where elements of x2 would go in the sorted x1; int64."""

    def set_index(self, index: Any, value: _Tensor, mode: str = "set") -> Proxy:
        """A copy of x in which x[index] is replaced by value (mode "set"), or has it added ("add") or multiplied ("mul")."""

    def sigmoid(self) -> Proxy:
        """1 / (1 + exp(-x)) (torch.sigmoid)."""

    def sign(self) -> Proxy:
        """-1, 0 or 1 by sign; NaN stays NaN."""

    def silu(self) -> Proxy:
        """x * sigmoid(x) (torch.nn.functional.silu)."""

    def sin(self) -> Proxy:
        """Sine of radians."""

    def sinh(self) -> Proxy:
        """Hyperbolic sine."""

    def slogdet(self) -> _slogdet:
        """Sign and logarithm of the absolute determinant."""

    def softmax(self, axis: int = -1, dtype: _DTypeLike | None = None) -> Proxy:
        """Exponentials that sum to 1 along an axis (torch.nn.functional.softmax)."""

    def softplus(self, beta: float = 1.0, threshold: float = 20.0) -> Proxy:
        """log(1 + exp(beta x)) / beta, and x itself above the threshold (torch.nn.functional.softplus)."""

    def solve(self, x2: _Tensor) -> Proxy:
        """The x with x1 @ x = x2; a singular matrix is an error."""

    def sort(self, axis: int = -1, descending: _bool = False) -> Proxy:
        """Elements in order along an axis; NaN counts as largest."""

    def sqrt(self) -> Proxy:
        """Square root."""

    def square(self) -> Proxy:
        """x * x."""

    def squeeze(self, axis: int | Sequence[int]) -> Proxy:
        """Axes of extent 1 removed."""

    def std(self, axis: int | Sequence[int] | None = None, keepdims: _bool = False, correction: float = 0.0) -> Proxy:
        """Standard deviation."""

    def stop_gradient(self) -> Proxy:
        """x itself, taken as a constant when differentiated (jax.lax.stop_gradient)."""

    def subtract(self, x2: _Tensor) -> Proxy:
        """Difference x1 - x2."""

    def sum(
        self, axis: int | Sequence[int] | None = None, keepdims: _bool = False, dtype: _DTypeLike | None = None
    ) -> Proxy:
        """Sum; int64 for integers and bool."""

    def svd(self, full_matrices: _bool = True) -> _svd:
        """Singular values s, largest first, with u @ diag(s) @ vh = x."""

    def svdvals(self) -> Proxy:
        """Singular values, largest first."""

    def swapaxes(self, axis1: int, axis2: int) -> Proxy:
        """Two axes swapped (numpy.swapaxes)."""

    def take(self, indices: _Tensor, axis: int | None = None) -> Proxy:
        """Positions along an axis, in the order and shape of the indices; negative ones count from the end."""

    def take_along_axis(self, indices: _Tensor, axis: int = -1) -> Proxy:
        """For every place off the axis, its own positions along it (torch.gather, with broadcasting)."""

    def tan(self) -> Proxy:
        """Tangent of radians."""

    def tanh(self) -> Proxy:
        """Hyperbolic tangent."""

    def tensordot(self, x2: _Tensor, axes: int | tuple[Sequence[int], Sequence[int]] = 2) -> Proxy:
        """Sums of products over axes: the last of x1 with the first of x2, or a tuple (axes of x1, axes of x2)."""

    def tile(self, *repetitions: int | Sequence[int]) -> Proxy:
        """The tensor repeated as a whole."""

    def topk(self, k: int, axis: int = -1, largest: _bool = True) -> _topk:
        """The k largest or smallest elements along an axis, in order, and their positions (torch.topk)."""

    def trace(self) -> Proxy:
        """Sum of the main diagonal; int64 for integers."""

    def tril(self, k: int = 0) -> Proxy:
        """The lower triangle of the last two axes; zero above it."""

    def triu(self, k: int = 0) -> Proxy:
        """The upper triangle of the last two axes; zero below it."""

    def trunc(self) -> Proxy:
        """Rounded towards zero; integers stay as they are."""

    def unfold(self, axis: int, size: int, step: int = 1) -> Proxy:
        """Windows along an axis, as a new last axis (torch.Tensor.unfold)."""

    def var(self, axis: int | Sequence[int] | None = None, keepdims: _bool = False, correction: float = 0.0) -> Proxy:
        """Variance."""

    def vecdot(self, x2: _Tensor, axis: int = -1) -> Proxy:
        """Sum of products along an axis."""

    def vector_norm(self, axis: int | Sequence[int] | None = None, keepdims: _bool = False, ord: float = 2.0) -> Proxy:
        """The ord-norm of the elements (array API linalg.vector_norm)."""

class EmbedLnSites(SiteNamespace):
    """Sites: embed_ln."""

    scale: Site
    """[rows, seq, 1]: divisor of the norm between the embeddings and the first block."""
    normalized: Site
    """[rows, seq, d_model]: its normalized input, before gain and bias."""

class BlocksOneLn1Sites(SiteNamespace):
    """Sites: ln1."""

    scale: Site
    """[rows, seq, 1]: divisor of the norm that attention (or the mixer) reads."""
    normalized: Site
    """[rows, seq, d_model]: its normalized input, before gain and bias."""

class BlocksOneAttnSites(SiteNamespace):
    """Sites: attn."""

    q: Site
    """[rows, seq, head, d_head]: queries as projected, before norm and rotary embedding."""
    k: Site
    """[rows, seq, kv_head, d_head]: keys as projected, before norm and rotary embedding."""
    q_normed: Site
    """[rows, seq, head, d_head]: queries after their own norm."""
    k_normed: Site
    """[rows, seq, kv_head, d_head]: keys after their own norm."""
    v: Site
    """[rows, seq, kv_head, d_head]: values."""
    rot_q: Site
    """[rows, seq, head, d_head]: queries as they are multiplied, after the rotary embedding."""
    rot_k: Site
    """[rows, seq, kv_head, d_head]: keys as they are multiplied, after the rotary embedding."""
    attn_scores: Site
    """[rows, head, query, key]: scaled, capped, biased and masked scores."""
    sinks: Site
    """[rows, head, query]: score of a learned sink beside the scores of the keys."""
    pattern: Site
    """[rows, head, query, key]: softmax of the scores (and the sink)."""
    z: Site
    """[rows, seq, head, d_head]: pattern times values, per head."""
    z_out: Site
    """[rows, seq, head, d_head]: z as the output projection takes it, where a gate or norm stands between."""
    result: Site
    """[rows, seq, head, d_model]: what each head writes; computed only when asked for."""
    out: Site
    """[rows, seq, d_model]: raw output of the attention module."""

class BlocksOneSsmSites(SiteNamespace):
    """Sites: ssm."""

    conv: Site
    """[rows, seq, channels]: output of a state-space layer's convolution."""
    x: Site
    """[rows, seq, channels]: what enters its recurrence."""
    dt: Site
    """[rows, seq, heads]: step sizes, after softplus (Mamba: one per channel)."""
    B: Site
    """[rows, seq, state]: input matrices."""
    C: Site
    """[rows, seq, state]: output matrices."""
    state: Site
    """[rows, seq, channels, state]: state after each position; read only."""
    y: Site
    """[rows, seq, channels]: readout of the states plus D times x, before the gate."""

class BlocksOneMixerSites(SiteNamespace):
    """Sites: mixer."""

    out: Site
    """[rows, seq, d_model]: raw output of the mixer's module."""

class BlocksOneLn1PostSites(SiteNamespace):
    """Sites: ln1_post."""

    scale: Site
    """[rows, seq, 1]: divisor of the norm that follows attention (sandwich and post-norms)."""
    normalized: Site
    """[rows, seq, d_model]: its normalized input, before gain and bias."""

class BlocksOneCrossAttnSites(SiteNamespace):
    """Sites: cross_attn."""

    q: Site
    """[rows, seq, head, d_head]: queries as projected, before norm and rotary embedding; of the attention to the encoder."""
    k: Site
    """[rows, seq, kv_head, d_head]: keys as projected, before norm and rotary embedding; of the attention to the encoder."""
    q_normed: Site
    """[rows, seq, head, d_head]: queries after their own norm; of the attention to the encoder."""
    k_normed: Site
    """[rows, seq, kv_head, d_head]: keys after their own norm; of the attention to the encoder."""
    v: Site
    """[rows, seq, kv_head, d_head]: values; of the attention to the encoder."""
    rot_q: Site
    """[rows, seq, head, d_head]: queries as they are multiplied, after the rotary embedding; of the attention to the encoder."""
    rot_k: Site
    """[rows, seq, kv_head, d_head]: keys as they are multiplied, after the rotary embedding; of the attention to the encoder."""
    attn_scores: Site
    """[rows, head, query, key]: scaled, capped, biased and masked scores; of the attention to the encoder."""
    sinks: Site
    """[rows, head, query]: score of a learned sink beside the scores of the keys; of the attention to the encoder."""
    pattern: Site
    """[rows, head, query, key]: softmax of the scores (and the sink); of the attention to the encoder."""
    z: Site
    """[rows, seq, head, d_head]: pattern times values, per head; of the attention to the encoder."""
    z_out: Site
    """[rows, seq, head, d_head]: z as the output projection takes it, where a gate or norm stands between; of the attention to the encoder."""
    result: Site
    """[rows, seq, head, d_model]: what each head writes; computed only when asked for; of the attention to the encoder."""
    out: Site
    """[rows, seq, d_model]: raw output of the attention module; of the attention to the encoder."""

class BlocksOneLn2Sites(SiteNamespace):
    """Sites: ln2."""

    scale: Site
    """[rows, seq, 1]: divisor of the norm that the MLP reads."""
    normalized: Site
    """[rows, seq, d_model]: its normalized input, before gain and bias."""

class BlocksOneMlpSites(SiteNamespace):
    """Sites: mlp."""

    pre: Site
    """[rows, seq, d_mlp]: input of the nonlinearity."""
    pre_linear: Site
    """[rows, seq, d_mlp]: linear side of a gated MLP."""
    post: Site
    """[rows, seq, d_mlp]: hidden activations, as projected down."""
    router_logits: Site
    """[rows, seq, experts]: router's score of every expert."""
    expert_indices: Site
    """[rows, seq, slot]: numbers of the chosen experts; read only."""
    expert_weights: Site
    """[rows, seq, slot]: their weights."""
    expert_out: Site
    """[rows, seq, slot, d_model]: what each chosen expert adds, weighted; computed only when asked for."""
    out: Site
    """[rows, seq, d_model]: raw output of the MLP."""

class BlocksOneLn2PostSites(SiteNamespace):
    """Sites: ln2_post."""

    scale: Site
    """[rows, seq, 1]: divisor of the norm that follows the MLP."""
    normalized: Site
    """[rows, seq, d_model]: its normalized input, before gain and bias."""

class BlocksOneSites(SiteNamespace):
    """Sites: one block."""

    resid_pre: Site
    """[rows, seq, d_model]: residual stream before the block."""
    ln1: BlocksOneLn1Sites
    attn_in: Site
    """[rows, seq, d_model]: what the attention module takes."""
    attn: BlocksOneAttnSites
    mixer_in: Site
    """[rows, seq, d_model]: what a recurrence or convolution over positions takes."""
    ssm: BlocksOneSsmSites
    mixer: BlocksOneMixerSites
    ln1_post: BlocksOneLn1PostSites
    attn_out: Site
    """[rows, seq, d_model]: what attention adds to the residual stream, after norms and factors."""
    mixer_out: Site
    """[rows, seq, d_model]: what the mixer adds to the residual stream."""
    resid_mid: Site
    """[rows, seq, d_model]: residual stream between attention (or mixer) and MLP."""
    cross_attn_in: Site
    """[rows, seq, d_model]: what the attention module takes; of the attention to the encoder."""
    cross_attn: BlocksOneCrossAttnSites
    cross_attn_out: Site
    """[rows, seq, d_model]: what attention adds to the residual stream, after norms and factors; of the attention to the encoder."""
    resid_mid_cross: Site
    """[rows, seq, d_model]: residual stream between attention to the encoder and MLP."""
    ln2: BlocksOneLn2Sites
    mlp_in: Site
    """[rows, seq, d_model]: what the MLP takes."""
    mlp: BlocksOneMlpSites
    ln2_post: BlocksOneLn2PostSites
    mlp_out: Site
    """[rows, seq, d_model]: what the MLP adds to the residual stream, after norms and factors."""
    resid_post: Site
    """[rows, seq, d_model]: residual stream after the block."""

class BlocksSites(NumberedNamespace):
    """The blocks, by number; negative ones count from the end."""

    def __getitem__(self, index: object) -> BlocksOneSites: ...
    def __iter__(self) -> Iterator[BlocksOneSites]: ...

class LnFinalSites(SiteNamespace):
    """Sites: ln_final."""

    scale: Site
    """[rows, seq, 1]: divisor of the final norm."""
    normalized: Site
    """[rows, seq, d_model]: its normalized input, before gain and bias."""

class RunSites(SiteNamespace):
    """Sites: what a run has."""

    embed: Site
    """[rows, seq, d_model]: token embedding, as the embedding module gives it."""
    pos_embed: Site
    """[rows, seq, d_model]: learned (or fixed, added) positional embedding, one per row."""
    token_type_embed: Site
    """[rows, seq, d_model]: embedding of token types, where they are added."""
    patch_embed: Site
    """[rows, patches, d_model]: embedded image patches, before class token and positions."""
    embed_ln: EmbedLnSites
    blocks: BlocksSites
    ln_final: LnFinalSites
    logits: Site
    """[rows, seq, d_vocab]: logits over the vocabulary, as the model returns them."""
    encoder: RunSites
    decoder: RunSites
