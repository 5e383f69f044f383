"""Memory for what is kept of each column."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from normgraph.compile.tensor_program import Tensor
from normgraph.compile.tir import Expr, Stmt, i64, plus, times

# Elements between the end of one array and the beginning of the next.
_STAGGER = 80


class ColumnArrays:
    """Arrays of columns, all of one size, in one piece of memory a type.

    Each begins at another line of a page, or in L1 they would all lie in the same sets.
    """

    def __init__(self, size: Expr) -> None:
        self.size = size
        self.memory: dict[str, Any] = {}
        self.count: dict[str, int] = {}

    def new(self, tensor: Tensor, stmts: list[Stmt]) -> Any:
        """One more array, of the tensor's type."""
        dtype = tensor.dtype
        if dtype not in self.memory:
            room = tirx.Var("room", "int64")
            self.memory[dtype] = tirx.decl_buffer((room,), dtype, "columns", scope="global")
        data = self.memory[dtype].data
        index = self.count.get(dtype, 0)
        self.count[dtype] = index + 1
        start = times(i64(index), plus(self.size, i64(_STAGGER)))
        array = tirx.decl_buffer((self.size,), dtype, tensor.name, data=data, elem_offset=start)
        stmts.append(tirx.DeclBuffer(array, data=data))
        return array

    def allocate(self) -> list[Stmt]:
        """The memory of all of them."""
        stmts: list[Stmt] = []
        for dtype, memory in self.memory.items():
            size = times(i64(self.count[dtype]), plus(self.size, i64(_STAGGER)))
            stmts += [tirx.Bind(memory.shape[0], size), tirx.AllocBuffer(memory)]
        return stmts
