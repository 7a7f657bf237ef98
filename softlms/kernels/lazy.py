"""A matrix product that is computed only when its values are used.

Some transformers blocks read a linear layer's ``weight`` at each call: T5 only for its dtype, Mamba's fused kernels for
its values. A factored layer has no weight, and multiplying its factors for nothing would be slower than dense.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

__all__ = ["lazy_product"]


def lazy_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, shape (m, n), differentiable in both; reading dtype, device and shape costs nothing."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # graphs drop what is not used
        return left @ right
    return _Multiply.apply(left, right)


class _Product(Tensor):
    """Has no values until an operation needs them."""

    left: Tensor
    right: Tensor

    @staticmethod
    def __new__(cls, left: Tensor, right: Tensor) -> _Product:
        shape = (left.shape[0], right.shape[1])
        product = Tensor._make_wrapper_subclass(cls, shape, dtype=left.dtype, device=left.device)
        product.left, product.right = left, right
        return product

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = tree_map_only(_Product, lambda product: product.left @ product.right, (args, kwargs or {}))
        return func(*args, **kwargs)


class _Multiply(torch.autograd.Function):
    """Gradients of left @ right, also if a kernel takes the product without torch's dispatch."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        return _Product(left.detach(), right.detach())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        left, right = ctx.saved_tensors
        return gradient @ right.T, left.T @ gradient
