"""What `native/module.c` offers: addresses of tensors, and strides in numbers."""

def unusable() -> str | None: ...
def multiply(
    out: int,
    out_stride: int,
    x: int,
    x_stride: int,
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
def gate(*arguments: int) -> None:
    """out, g and u, each with its stride; rows, width; threads, parallel."""

def gate_backward(*arguments: int) -> None:
    """dg, du, dout, g and u, each with its stride; rows, width; threads, parallel."""

def attention_bytes(
    tokens: int, heads: int, kv_heads: int, head_dim: int, threads: int, /
) -> int: ...
def attend(*arguments: float) -> None:
    """q, k, v, out, normalizer, workspace; tokens, heads, kv_heads, head_dim; the strides of
    q, k and v; scale; threads, parallel."""

def attend_backward(*arguments: float) -> None:
    """dout, q, k, v, out, normalizer, dq, dk, dv, workspace; tokens, heads, kv_heads, head_dim; the
    strides of dout, q, k and v; scale; threads, parallel."""
