"""PyTorch on the GPU: the float64 answers, and the peers that are timed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

from normgraph import NormSpec
from normgraph.errors import ToolMissing

Tensors = Mapping[str, Any]

# The operators that are timed and answer in float64; rms_norm is of torch 2.4.
_NEEDED = ("batch_norm", "instance_norm", "group_norm", "layer_norm", "rms_norm")

# dtype: how large one unit in the last place of 1 is.
_UNITS = {"float16": 2.0**-10, "bfloat16": 2.0**-7}
_BOUND = 2e-5


def usable() -> None:
    """Raises ToolMissing where there is no PyTorch for CUDA, or it is too old."""
    for needed in ("torch", "numpy", "typing_extensions"):
        if importlib.util.find_spec(needed) is None:
            raise ToolMissing(
                f"gpu_check needs PyTorch with CUDA and NumPy, and {needed} is not installed."
            )
    torch: Any = importlib.import_module("torch")
    if not torch.cuda.is_available():
        raise ToolMissing(f"torch {torch.__version__} cannot use the CUDA device here.")
    lacking = [name for name in _NEEDED if not hasattr(torch.nn.functional, name)]
    if lacking:
        raise ToolMissing(
            f"gpu_check needs torch 2.4 or later, and torch {torch.__version__} has no"
            f" torch.nn.functional.{lacking[0]}. Set PYTHON to a Python with a later one."
        )


def draw(
    torch: Any,
    spec: NormSpec,
    shape: tuple[int, ...],
    dtype: str,
    seed: int,
    device: str = "cuda",
) -> dict[str, Any]:
    """Inputs of a forward, and dy: N(0, 1), gamma and running_var away from 0."""
    random = torch.Generator(device=device).manual_seed(seed)
    kind = getattr(torch, dtype)

    def normal(size: tuple[int, ...], to: Any) -> Any:
        return torch.randn(size, generator=random, device=device).to(to)

    last = spec.op in ("layer_norm", "rms_norm")
    extent = (shape[-1] if last else shape[1],)
    made = {"x": normal(shape, kind), "gamma": (normal(extent, torch.float32).abs() + 0.5).to(kind)}
    if spec.op != "rms_norm":
        made["beta"] = normal(extent, kind)
    if spec.track_running_stats:
        made["running_mean"] = normal(extent, torch.float32)
        made["running_var"] = normal(extent, torch.float32).abs() + 0.5
    made["dy"] = normal(shape, kind)
    return made


def forward_of(torch: Any, spec: NormSpec, *, training: bool = True) -> Callable[..., Any]:
    """`torch.nn.functional`'s operator, called with the inputs by name."""
    functional = torch.nn.functional

    def run(
        x: Any,
        gamma: Any = None,
        beta: Any = None,
        running_mean: Any = None,
        running_var: Any = None,
    ) -> Any:
        if spec.op == "batch_norm":
            return functional.batch_norm(
                x, running_mean, running_var, gamma, beta, training, spec.momentum, spec.eps
            )
        if spec.op == "instance_norm":
            return functional.instance_norm(x, None, None, gamma, beta, True, 0.1, spec.eps)
        if spec.op == "group_norm":
            return functional.group_norm(x, spec.groups, gamma, beta, spec.eps)
        if spec.op == "layer_norm":
            return functional.layer_norm(x, x.shape[-1:], gamma, beta, spec.eps)
        return functional.rms_norm(x, x.shape[-1:], gamma, spec.eps)

    return run


def answers(torch: Any, spec: NormSpec, kind: str, inputs: Tensors) -> dict[str, Any]:
    """Every output of a kind in float64, by PyTorch's own operators and autograd."""
    wide = {
        name: value.double().requires_grad_(name in ("x", "gamma", "beta"))
        for name, value in inputs.items()
        if name in ("x", "gamma", "beta")
    }
    stats = {n: inputs[n].double().clone() for n in inputs if n.startswith("running_")}
    frozen = kind == "inference" and bool(stats)
    y = forward_of(torch, spec, training=not frozen)(**wide, **stats)
    if kind == "backward":
        sources = {"dx": "x", "dgamma": "gamma", "dbeta": "beta"}
        names = [name for name, source in sources.items() if source in wide]
        wanted = [wide[sources[name]] for name in names]
        found = torch.autograd.grad(y, wanted, inputs["dy"].double())
        return dict(zip(names, found, strict=True))
    made = {"y": y.detach()}
    if kind == "forward":
        made |= _statistics(spec, wide["x"].detach())
        made |= {f"new_{name}": value for name, value in stats.items()}
    return made


def _statistics(spec: NormSpec, x: Any) -> dict[str, Any]:
    """mean and inv_std with the reduced axes kept as 1."""
    if spec.op == "group_norm":
        x = x.unflatten(1, (spec.groups, x.shape[1] // (spec.groups or 1)))
        axes = tuple(range(2, x.ndim))
    elif spec.op in ("layer_norm", "rms_norm"):
        axes = (x.ndim - 1,)
    elif spec.op == "batch_norm":
        axes = (0, *range(2, x.ndim))
    else:
        axes = tuple(range(2, x.ndim))
    if spec.op == "rms_norm":
        return {"inv_std": (x.square().mean(axes, keepdim=True) + spec.eps).rsqrt()}
    mean = x.mean(axes, keepdim=True)
    variance = (x - mean).square().mean(axes, keepdim=True)
    return {"mean": mean, "inv_std": (variance + spec.eps).rsqrt()}


def worst(name: str, dtype: str, got: Any, want: Any, inputs: Tensors) -> float:
    """The largest error of an output as a share of what is allowed: up to 1 is right.

    Allowed are 2e-5 of the largest value, or of the size a sum of terms of random sign has, and one
    unit in the last place for half types.
    """
    scale = want.abs().max().item()
    if name in ("dgamma", "dbeta"):
        dy = inputs["dy"].double()
        scale = max(scale, (dy.norm() / inputs["gamma"].numel() ** 0.5).item())
    if name in ("mean", "new_running_mean"):
        x = inputs["x"].double()
        scale = max(scale, (x.norm() / x.numel() ** 0.5).item() * 0.05)
    allowed = _BOUND * (scale + 1e-3) + _UNITS.get(dtype, 0.0) * want.abs()
    share = ((got.double() - want.reshape(got.shape)).abs() / allowed.reshape(got.shape)).max()
    return float("inf") if share.isnan() else float(share.item())


def compiled(torch: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
    """The operator by torch.compile, from nothing."""
    config: Any = importlib.import_module("torch._functorch.config")
    if hasattr(config, "donated_buffer"):  # of torch 2.5; it would let a backward run only once
        config.donated_buffer = False
    torch.compiler.reset()
    made: Callable[..., Any] = torch.compile(forward, dynamic=False)
    return made


def peer(torch: Any, kind: str, inputs: Tensors, forward: Callable[..., Any]) -> Any:
    """PyTorch's call for one kind by its operator; fresh outputs."""
    given = {name: value for name, value in inputs.items() if name != "dy"}
    if "running_mean" in given:
        # PyTorch takes no half parameters beside float32 statistics, and updates those in place.
        given = {n: v.float() if n in ("gamma", "beta") else v for n, v in given.items()}
        given |= {n: given[n].clone() for n in ("running_mean", "running_var")}
    if kind != "backward":

        def run() -> Any:
            with torch.no_grad():
                return forward(**given)

        return run
    sources = [n for n in ("x", "gamma", "beta") if n in given]
    given |= {name: given[name].detach().requires_grad_() for name in sources}
    y = forward(**given)
    wanted = [given[name] for name in sources]
    return lambda: torch.autograd.grad(y, wanted, inputs["dy"], retain_graph=True)
