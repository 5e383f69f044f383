"""Tensors that torch is recording, tensors without memory, and torch's default device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from normgraph import NormSpec
from normgraph.errors import ArgumentError, ArgumentTypeError

if TYPE_CHECKING:
    from normgraph.runtime import Operator

torch = pytest.importorskip("torch")


@pytest.fixture
def op(build_operator: Callable[..., Operator]) -> Operator:
    return build_operator(NormSpec("instance_norm"), ("N", 8, "H", "W"))


@pytest.fixture
def arrays() -> tuple[Any, ...]:
    return torch.randn(2, 8, 3, 5), torch.ones(8), torch.zeros(8)


@pytest.fixture
def meta_by_default() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


# torch compiles its own formulas with a function it has deprecated.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_forward_mode_tangent_is_refused(op: Operator, arrays: tuple[Any, ...]) -> None:
    x, *rest = arrays
    op.forward(x, *rest)  # what is refused is refused on the short path too
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(ArgumentError, match="x has a forward-mode tangent"):
            op.forward(dual, *rest)
        assert op.forward(x, *rest).y.shape == x.shape


def test_tracing_is_refused(op: Operator, arrays: tuple[Any, ...]) -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    x, *rest = arrays
    op.forward(x, *rest)
    with pytest.raises(ArgumentError, match="is being traced"):
        make_fx(lambda t: op.forward(t, *rest).y)(x)


def test_a_tensor_without_memory_is_refused(op: Operator, arrays: tuple[Any, ...]) -> None:
    x, *rest = arrays
    x.untyped_storage().resize_(0)
    with pytest.raises(ArgumentTypeError, match="x has no memory"):
        op.forward(x, *rest)


@pytest.mark.usefixtures("meta_by_default")
def test_outputs_are_on_the_cpu_whatever_the_default_device(
    op: Operator, arrays: tuple[Any, ...]
) -> None:
    x, gamma, beta = (torch.ones(t.shape, device="cpu") for t in arrays)
    strided = torch.ones((2, 8, 3, 10), device="cpu")[..., ::2]
    for given in (x, strided):
        assert all(t.device.type == "cpu" for t in op.forward(given, gamma, beta))
        assert op.inference(given, gamma, beta).device.type == "cpu"
