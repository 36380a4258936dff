"""Clipping the gradients of one optimizer, and the checks of thresholds and algorithms."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.nn.utils import clip_grad_norm_, clip_grad_value_, clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from eventtrain.errors import MisconfigurationError

CLIP_ALGORITHMS = ("norm", "value")


def clip_gradients(optimizer: Optimizer, value: float, algorithm: str, norm_type: float) -> Tensor | None:
    """Clip the gradients of an optimizer's parameters in place.

    Args:
        optimizer: The optimizer.
        value: The threshold, a positive number.
        algorithm: ``"norm"``, by :func:`torch.nn.utils.clip_grad_norm_`, or ``"value"``, by
            :func:`torch.nn.utils.clip_grad_value_`.
        norm_type: The order p of the norm.

    Returns:
        The total norm before clipping, a scalar tensor on the gradients' device; None for ``"value"``.

    Raises:
        MisconfigurationError: If the threshold is not a positive number, or the algorithm is unknown.
    """
    if type(value) is not float or not value > 0 or algorithm not in CLIP_ALGORITHMS:
        check_clip_val(value, "gradient_clip_val")
        check_clip_algorithm(algorithm)
    parameters: list[Tensor] = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    if algorithm == "value":
        clip_grad_value_(parameters, value)
        return None
    if not parameters or not hasattr(parameters[0], "device_mesh"):
        return clip_grad_norm_(parameters, value, norm_type=norm_type)
    norm = total_norm([parameter.grad for parameter in parameters if parameter.grad is not None], norm_type)
    for of_mesh in by_mesh(parameters):
        clip_grads_with_norm_(of_mesh, value, norm)
    return norm


def total_norm(gradients: list[Tensor], norm_type: float) -> Tensor:
    """Return the norm of gradients together, also of those that several processes hold in parts."""
    norms: list[Any] = [get_total_norm(each, norm_type) for each in by_mesh(gradients)]
    # Of gradients in parts, the norm is a part too.
    norms = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    return norms[0] if len(norms) == 1 else get_total_norm(norms, norm_type)


def by_mesh(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Return tensors in one list, or, if they are divided along different meshes of processes, in a list for each mesh."""
    meshes = [getattr(tensor, "device_mesh", None) for tensor in tensors]
    return [[t for t, other in zip(tensors, meshes, strict=True) if other == mesh] for mesh in dict.fromkeys(meshes)]


def check_clip_val(value: Any, argument: str) -> None:
    """Check a clipping threshold.

    Raises:
        MisconfigurationError: If it is not a positive number.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value) or value <= 0:
        raise MisconfigurationError(f"{argument} has to be a positive number, or None for no clipping; it is {value!r}.")


def check_clip_algorithm(algorithm: Any) -> str:
    """Return a clipping algorithm if it is known.

    Raises:
        MisconfigurationError: If it is not.
    """
    if algorithm not in CLIP_ALGORITHMS:
        known = " or ".join(repr(name) for name in CLIP_ALGORITHMS)
        raise MisconfigurationError(f"gradient_clip_algorithm has to be {known}; it is {algorithm!r}.")
    return str(algorithm)
