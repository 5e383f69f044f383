"""The forward and the inference graph of every row of the table.

With m the elements of a statistic's slice and c the correction:

    mean = sum(x) / m
    delta = sum(x - mean) / m                        zero but for rounding
    var = |sum((x - mean)^2) - m * delta^2| / (m - c)
    inv_std = 1 / sqrt(var + eps)
    y = (x - mean - delta) * inv_std * gamma + beta

rms_norm: var = sum(x^2) / m, y = x * inv_std * gamma. The derivation is in docs/derivations.md.
"""

from __future__ import annotations

from normgraph.graphs.frame import Count, Frame
from normgraph.graphs.writer import Operand


def write_forward(f: Frame) -> None:
    """Write the nodes of kind forward or inference."""
    if f.kind == "inference" and f.spec.track_running_stats:
        _write_folded(f)
        return
    g, x = f.g, f.load("x")
    centred = f.layout.centred
    contiguous = _trailing(f.layout.stat_axes, f.layout.rank)
    deviation = x
    if centred:
        total = f.stat_sum("x_sum", x, contiguous)
        count = f.count(total)
        mean = g.Div("mean", total, count.m)
        x_mu = g.Sub("x_mu", x, mean)
        delta = g.Div("delta", f.stat_sum("x_mu_sum", x_mu, contiguous), count.m)
        deviation = g.Sub("x_centred", x_mu, delta)
        raw = f.stat_sum("square_sum", g.Mul("square", x_mu, x_mu), contiguous)
        shift = g.Mul("delta_square_sum", g.Mul("delta_square", delta, delta), count.m)
        # Rounding can leave a tiny negative; unlike Relu, Abs keeps a NaN.
        squares = g.Abs("squares", g.Sub("squares_signed", raw, shift))
        f.expose("delta", f.layout.stat_dims)
    else:
        squares = f.stat_sum("squares", g.Mul("square", x, x), contiguous)
        count = f.count(squares)
    var = g.Div("var", squares, count.dof)
    f.expose("var", f.layout.stat_dims)
    std = g.Sqrt("std", g.Add("var_eps", var, f.eps))
    inv_std = g.Reciprocal("inv_std", std)
    _write_affine(f, deviation, inv_std)
    if f.kind == "forward" and f.spec.track_running_stats:
        _write_running(f, squares, count)


def _trailing(axes: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """Those of `axes` that are the last axes of x, without a gap."""
    return tuple(a for a in axes if set(range(a, rank)) <= set(axes))


def _write_affine(f: Frame, deviation: str, inv_std: str) -> None:
    """y = deviation * inv_std * gamma + beta, the row scalars multiplied first."""
    g, scale = f.g, inv_std
    bias = bool(f.spec.bias)
    y = f.result("y")
    if f.layout.gamma_varies and not f.layout.row_axes:
        deviation = g.Mul("x_hat", deviation, inv_std)
        scale = f.load("gamma")
    elif f.spec.weight:
        scale = g.Mul("scale", f.load("gamma"), inv_std)
    scaled = g.Mul("y_scaled" if bias else y, deviation, scale)
    if bias:
        g.Add(y, scaled, f.load("beta"))


def _write_folded(f: Frame) -> None:
    """y = x * scale + shift with the running statistics, gamma and beta folded into two."""
    g, x = f.g, f.load("x")
    mean, var = f.load("running_mean"), f.load("running_var")
    std = g.Sqrt("std", g.Add("var_eps", var, f.eps))
    if f.spec.weight:
        scale = g.Mul("scale", f.load("gamma"), g.Reciprocal("inv_std", std))
    else:
        scale = g.Reciprocal("scale", std)
    shift = g.Mul("mean_scaled", mean, scale)
    shift = g.Sub("shift", f.load("beta"), shift) if f.spec.bias else g.Neg("shift", shift)
    g.Add(f.result("y"), g.Mul("x_scaled", x, scale), shift)
    for name in ("scale", "shift"):
        f.expose(name, f.layout.param_dims)


def _write_running(f: Frame, squares: str, count: Count) -> None:
    """new = old * keep + batch * rate; batch is the mean over n of the slices' statistics.

    Not old + rate * (batch - old), which cancels where rate is near 1. The torch convention takes
    the variance over m - 1, at least 1, the others over m. An empty x changes nothing.
    """
    g, layout = f.g, f.layout
    unbiased = f.spec.convention == "torch"
    over = f.less_one("m_unbiased", count.m) if unbiased else count.m
    mean, var = "mean", g.Div("running_batch_var", squares, over)
    rest = tuple(a for a in range(layout.rank) if a not in layout.stat_axes + layout.param_axes)
    if rest:
        n = f.batch_size(mean)
        mean = g.Div("mean_over_n", f.sum("mean_sum", mean, rest), n)
        var = g.Div("var_over_n", f.sum("var_sum", var, rest), n)
    keep, rate = _weights(f, weights_new=unbiased)
    for name, batch in (("running_mean", mean), ("running_var", var)):
        kept = g.Mul(f"{name}_kept", f.load(name), keep)
        g.Add(f.result(f"new_{name}"), kept, g.Mul(f"{name}_added", batch, rate))


def _weights(f: Frame, *, weights_new: bool) -> tuple[Operand, Operand]:
    """The weights of the old value and of the new: momentum is one of them, or x is empty: 1, 0."""
    g = f.g
    given: Operand
    other: Operand
    if f.spec.momentum is None:
        given = f.load("momentum")
        other = g.Sub("one_less_momentum", 1.0, given)
    else:
        given = float(f.spec.momentum)
        other = 1.0 - given
    keep, rate = (other, given) if weights_new else (given, other)
    if not f.layout.may_be_empty:
        return keep, rate
    some = f.any_element()
    kept = g.Mul("keep_if_any", some, keep)
    return g.Add("keep", kept, g.Sub("none", 1.0, some)), g.Mul("rate_if_any", some, rate)
