"""The backward graphs of every row of the table.

With m the elements of a statistic's slice, c the correction and g = gamma * dy:

    delta = sum(x - mean) / m                        zero but for rounding
    dvar = -1/2 * inv_std^3 * (sum(g * (x - mean)) - delta * sum(g))
    dmean = -inv_std * sum(g) - 2 * dvar * delta * m / (m - c)
    dx = g * inv_std + dvar * 2 * (x - mean) / (m - c) + dmean / m
    dgamma = sum(dy * (x - mean - delta) * inv_std)
    dbeta = sum(dy)

rms_norm has no delta and no dmean. backward_from_output is the same with x - mean read off y as
(y - beta) / gamma / inv_std. The derivation is in docs/derivations.md.
"""

from __future__ import annotations

from normgraph.graphs.frame import Frame


def write_backward(f: Frame) -> None:
    """Write the nodes of kind backward, backward_frozen or backward_from_output."""
    g, layout = f.g, f.layout
    frozen = f.kind == "backward_frozen"
    dy = f.load("dy")
    inv_std = _frozen_inv_std(f) if frozen else f.load("inv_std")
    x_mu = _deviation(f, inv_std)
    scale = g.Mul("scale", f.load("gamma"), inv_std) if f.spec.weight else inv_std

    # Row sums serve the statistics and the parameters alike.
    dy_rows = f.sum("dy_rows", dy, layout.row_axes)
    dot_rows = f.sum("dot_rows", g.Mul("dot", dy, x_mu), layout.row_axes)
    if frozen:
        dot_sum = f.sum("dot_sum", dot_rows, layout.outer_axes)
        dy_sum = f.sum("dy_sum", dy_rows, layout.outer_axes)
        g.Mul(f.result("dx"), dy, scale)
        _write_parameters(f, dy_sum, g.Mul("dot_hat", dot_sum, inv_std))
        return

    # dmean sums the very product dx adds, so that at m = 1 they cancel exactly.
    count = f.count(inv_std)
    direct = g.Mul("dx_direct", dy, scale)
    g_rows, g_dot_rows = dy_rows, dot_rows
    if layout.gamma_varies:
        g_rows = g.Mul("g_rows", dy_rows, scale) if layout.row_axes else direct
        g_dot_rows = g.Mul("g_dot_rows", dot_rows, scale)
    dy_sum = f.sum("dy_sum", g_rows, layout.outer_axes)
    dot_sum = f.sum("dot_sum", g_dot_rows, layout.outer_axes)
    delta = None
    if layout.centred:
        delta = g.Div("delta", f.stat_sum("x_mu_sum", x_mu, layout.row_axes), count.m)
        dot_sum = g.Sub("dot_centred", dot_sum, g.Mul("dot_shift", delta, dy_sum))
    g_sum, g_dot = dy_sum, dot_sum
    if not layout.gamma_varies:
        g_sum, g_dot = g.Mul("g_sum", dy_sum, scale), g.Mul("g_dot", dot_sum, scale)

    # inv_std a factor at a time: its cube alone may leave float32's range.
    dvar = g.Mul("dvar", g.Mul("g_dot_var", g.Mul("g_dot_std", g_dot, inv_std), inv_std), -0.5)
    twice = g.Mul("dvar_twice", dvar, 2.0)
    through_var = g.Mul("dx_var", x_mu, g.Div("dvar_share", twice, count.dof))
    if delta is None:
        f.expose("dvar", layout.stat_dims)
        g.Add(f.result("dx"), direct, through_var)
    else:
        pull = g.Mul("dvar_delta", twice, delta)
        if count.ratio != 1:
            pull = g.Mul("dvar_delta_scaled", pull, count.ratio)
        dmean = g.Sub("dmean", g.Neg("mean_direct", g_sum), pull)
        for name in ("dvar", "dmean", "delta"):
            f.expose(name, layout.stat_dims)
        both = g.Add("dx_direct_var", direct, through_var)
        g.Add(f.result("dx"), both, g.Div("dmean_share", dmean, count.m))

    if layout.params_vary:
        dy_sum, dot_sum = dy_rows, dot_rows
        if delta is not None:
            shift = g.Mul("dot_rows_shift", dy_rows, delta)
            dot_sum = g.Sub("dot_rows_centred", dot_rows, shift)
    _write_parameters(f, dy_sum, g.Mul("dot_hat", dot_sum, inv_std))


def _frozen_inv_std(f: Frame) -> str:
    """1 / sqrt(running_var + eps)."""
    g, var = f.g, f.load("running_var")
    return g.Reciprocal("inv_std", g.Sqrt("std", g.Add("var_eps", var, f.eps)))


def _deviation(f: Frame, inv_std: str) -> str:
    """x - mean, from x or from the output."""
    g = f.g
    if f.kind == "backward_from_output":
        deviation = f.load("y")
        if f.spec.bias:
            deviation = g.Sub("y_less_beta", deviation, f.load("beta"))
        factor = g.Reciprocal("std", inv_std)
        if f.spec.weight:
            inverse = g.Reciprocal("inv_gamma", f.load("gamma"))
            if f.layout.gamma_varies and not f.layout.row_axes:
                deviation = g.Mul("x_hat", deviation, inverse)
            else:
                factor = g.Mul("std_over_gamma", inverse, factor)
        return g.Mul("x_mu", deviation, factor)
    if not f.layout.centred:
        return f.load("x")
    mean = f.load("running_mean" if f.kind == "backward_frozen" else "mean")
    return g.Sub("x_mu", f.load("x"), mean)


def _write_parameters(f: Frame, dy_sum: str, dot_hat: str) -> None:
    """dgamma = sum(dy * x_hat) and dbeta = sum(dy), from what is already summed over slices."""
    layout = f.layout
    done = layout.row_axes if layout.params_vary else layout.stat_axes
    rest = [a for a in range(layout.rank) if a not in layout.param_axes + done]
    for name, value in (("dgamma", dot_hat), ("dbeta", dy_sum)):
        if name in f.outputs:
            f.sum_to(name, value, rest)
