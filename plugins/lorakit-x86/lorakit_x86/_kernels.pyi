"""What `native/module.c` offers: addresses of tensors, and strides in numbers.

Units: 0 is AVX-512, 1 is AMX.
"""

def unusable(units: int, /) -> str | None: ...
def multiply(
    units: int,
    out: int,
    out_stride: int,
    x: int,
    x_stride: int,
    scale: int,
    weight: int,
    weight_stride: int,
    bf16: bool,
    transposed: bool,
    rows: int,
    columns: int,
    inner: int,
    add: bool,
    threads: int,
    parallel: int,
    /,
) -> None: ...
def adapt(*arguments: float | tuple[float, ...]) -> None:
    """Units; x and out, each with its stride; low; the layer; threads, parallel.

    A layer is a tuple: its weight, the stride and whether it is bf16; down, up, ratio, scale; rows,
    inputs, outputs, rank."""

def adapt_backward(*arguments: float | tuple[float, ...]) -> None:
    """Units; dout and x, each with its stride; low, d_low; dx and its stride, add; d_down, d_up;
    the layer, as above; threads, parallel."""

def gate(*arguments: int) -> None:
    """out, g and u, each with its stride; rows, width; threads, parallel."""

def gate_backward(*arguments: int) -> None:
    """dg, du, dout, g and u, each with its stride; rows, width; threads, parallel."""

def normalize(*arguments: float) -> None:
    """out, roots; x and its stride; weight; eps; rows, width; threads, parallel."""

def normalize_backward(*arguments: int) -> None:
    """dx; dout and x, each with its stride; weight, roots; rows, width; threads, parallel."""

def rotate(*arguments: int) -> None:
    """out; x and its stride; cos, sin and their stride; back; tokens, heads, head_dim, half;
    threads, parallel."""

def attention_bytes(
    units: int, tokens: int, heads: int, kv_heads: int, head_dim: int, threads: int, /
) -> int: ...

Attended = tuple[float, ...]
"""q, k and v, each with its stride; out, normalizer, workspace; heads, kv_heads, head_dim; scale;
places, lengths, documents."""

Half = tuple[object, ...]
"""Units; the half: norm, eps, rows, width, a tuple of the inner layers, the outer layer; of
attention the angles (cos, sin, their stride, how many of them count) and what is attended, where q,
k and v do not count, else nothing; where the inner layers' results are, whether the backward pass
makes them anew, where the outer's are; what is kept; work; threads, parallel."""

def feed_forward(half: Half, x: int, out: int, /) -> None: ...
def feed_forward_backward(
    half: Half, dout: int, x: int, dx: int, gradients: tuple[tuple[int, int, int], ...], /
) -> None:
    """Gradients: of each layer A's, B's and the sums; see sublayers.h."""

def self_attention(half: Half, x: int, out: int, /) -> None: ...
def self_attention_backward(
    half: Half, dout: int, x: int, dx: int, gradients: tuple[tuple[int, int, int], ...], /
) -> None: ...
def attend(units: int, attended: Attended, threads: int, parallel: int, /) -> None: ...
def attend_backward(
    units: int,
    dout: int,
    dout_stride: int,
    dq: int,
    dk: int,
    dv: int,
    attended: Attended,
    threads: int,
    parallel: int,
    /,
) -> None: ...
