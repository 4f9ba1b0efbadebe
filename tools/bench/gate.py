"""The gate before any speed: output and every gradient against the reference in float64.

The error of a tensor is its largest difference from float64, over the largest value there. It may be twice the error
that the reference makes in the precision of the inputs, plus a floor: 1e-6 for a value per element, and 2⁻²⁴√n for a
gradient that is a sum of n terms (what a plain float32 sum of so many random terms loses).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_CHUNK = 2**24  # elements the reference handles at once: its temporaries are about 25 times as large
FLOOR = 1e-6


class Gate:
    """Holds the truth for one set of inputs.

    Args:
        reference: ``reference(**inputs)``, in the precision of its inputs.
        inputs: tensors by name, all of them differentiated.
        batched: names whose first dimension is the batch; the others are parameters.
        grad: upstream gradient, of the output's shape.
    """

    def __init__(
        self, reference: Callable[..., Tensor], inputs: dict[str, Tensor], batched: tuple[str, ...], grad: Tensor
    ):
        self.inputs, self.batched, self.grad = inputs, batched, grad
        self.truth = self._in_chunks(reference, torch.float64)
        self.baseline = self._errors(self._in_chunks(reference, None))
        elements = inputs[batched[0]].numel()
        self.limits = {}
        for name, error in self.baseline.items():
            is_sum = name != "output" and name not in batched
            floor = 2**-24 * (elements / inputs[name].shape[0]) ** 0.5 if is_sum else 0.0
            self.limits[name] = 2 * error + max(FLOOR, floor)

    def check(self, call: Callable[..., Tensor]) -> tuple[dict[str, float], str | None]:
        """Errors of ``call(**inputs)`` and its gradients by name, and what is wrong, or None when nothing is."""
        errors = self._errors(self._whole(call))
        wrong = [
            f"{name} {error:.1e} (allowed {self.limits[name]:.1e})"
            for name, error in errors.items()
            if not error <= self.limits[name]
        ]
        return errors, "wrong: " + ", ".join(wrong) if wrong else None

    def _whole(self, call: Callable[..., Tensor]) -> dict[str, Tensor | None]:
        output = call(**self.inputs)
        grads = torch.autograd.grad(output, list(self.inputs.values()), self.grad, allow_unused=True)
        return {"output": output.detach(), **dict(zip(self.inputs, grads, strict=True))}

    def _in_chunks(self, reference: Callable[..., Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
        """Output and gradients of the reference, rows of the batch at a time; parameters' gradients are summed."""
        batch, per_row = len(self.grad), max(1, self.inputs[self.batched[0]][0].numel())
        size = max(1, _CHUNK // per_row)
        pieces: dict[str, list[Tensor]] = {name: [] for name in ("output", *self.batched)}
        sums: dict[str, Any] = {name: 0 for name in self.inputs if name not in self.batched}
        for start in range(0, batch, size):
            rows = slice(start, start + size)
            inputs = {n: (t.detach()[rows] if n in self.batched else t.detach()) for n, t in self.inputs.items()}
            inputs = {n: t.to(dtype or t.dtype).requires_grad_() for n, t in inputs.items()}
            output = reference(**inputs)
            grads = torch.autograd.grad(output, list(inputs.values()), self.grad[rows].to(output.dtype))
            pieces["output"].append(output.detach())
            for name, grad in zip(inputs, grads, strict=True):
                if name in self.batched:
                    pieces[name].append(grad)
                else:
                    sums[name] = sums[name] + grad.double()
        return {**{name: torch.cat(parts) for name, parts in pieces.items()}, **sums}

    def _errors(self, values: dict[str, Tensor | None]) -> dict[str, float]:
        return {name: _error(value, self.truth[name]) for name, value in values.items()}


def _error(value: Tensor | None, truth: Tensor) -> float:
    if value is None or value.shape != truth.shape or not value.isfinite().all():
        return float("inf")
    return float((value.double() - truth).abs().max() / truth.abs().max().clamp_min(1e-30))
