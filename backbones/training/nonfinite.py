"""Where NaN or infinity first appears in a forward pass."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def first_nonfinite_module(model: nn.Module, run: Callable[[], Any]) -> str | None:
    """Runs a forward pass again and names the first module whose output holds NaN or infinity.

    Args:
        model: the network; names are those of ``named_modules``.
        run: does the forward pass, such as ``lambda: model(batch)``. An exception it raises ends the search.
    Returns:
        The module's dotted name (innermost first, since inner modules finish first), "the input of NAME" when what the
        first module was given is not finite already, or None when every output was finite.
    """
    found: list[str] = []

    def check_input(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not found and not _is_finite((inputs, kwargs)):
                found.append(f"the input of {name}")

        return hook

    def check_output(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
            if not found and not _is_finite(output):
                found.append(name)

        return hook

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(check_input(name or "the model"), with_kwargs=True))
        handles.append(module.register_forward_hook(check_output(name or "the model")))
    try:
        run()
    except Exception:
        # Detectors check their own boxes and raise; what was found before stands.
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def first_nonfinite(tensors: Iterable[tuple[str, Tensor | None]]) -> str | None:
    """The name of the first tensor that holds NaN or infinity, or None: for parameters and gradients."""
    return next((name for name, tensor in tensors if tensor is not None and not torch.isfinite(tensor).all()), None)


def _is_finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not (value.is_floating_point() or value.is_complex()) or bool(torch.isfinite(value).all())
    if isinstance(value, dict):
        return all(_is_finite(v) for v in value.values())
    if isinstance(value, list | tuple):
        return all(_is_finite(v) for v in value)
    return True
