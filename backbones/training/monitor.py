"""What KArAt's operators do while they train: scores, output, how far a step moves it, and the parts' gradients."""

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_PARTS = (  # what a gradient's norm is shown for: pattern of a parameter's name, name of the part
    (r"operator\.(w|phi|phi2|psi)(\.|$)", r"operator.\1"),
    (r"attn\.(gate|qkv|proj)", r"attention.\1"),
    (r"\.mlp\.", "feed_forward"),
    (r"patch_embed|pos_embed|cls_token", "embedding"),
)


@dataclass
class _Probe:
    """The first image or window of an operator's last call."""

    arguments: tuple[Any, ...]
    output: Tensor | None = None


class OperatorMonitor:
    """Watches the operators of a backbone in single training steps; costs nothing in the others.

    Call ``watch`` before a step's forward pass and ``values`` after the step.

    Args:
        model: what is trained.
        trunk: the Karvis backbone within it.
        optimizer: of the model.
    """

    def __init__(self, model: nn.Module, trunk: nn.Module, optimizer: torch.optim.Optimizer):
        self.model, self.operators = model, trunk.operators()
        self.gates = {n.removesuffix(".gate"): p for n, p in trunk.named_parameters() if n.endswith(".gate")}
        self._probes: dict[str, _Probe] = {}
        self._hooks: list[Any] = []
        self._norms: dict[str, float] = {}
        optimizer.register_step_pre_hook(lambda *_: self._before_step())

    def watch(self) -> None:
        """The operators' arguments are kept until the optimizer's next step."""
        for name, operator in self.operators.items():

            def keep(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                first = tuple(a[:1].detach().clone() if isinstance(a, Tensor) else a for a in args)
                self._probes[name] = _Probe(first)

            self._hooks.append(operator.register_forward_pre_hook(keep))

    def _before_step(self) -> None:
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._norms = gradient_norms(self.model)
        for name, probe in self._probes.items():
            probe.output = self._output(name, probe)

    def values(self) -> dict[str, float]:
        """Figures of the step that was watched, of one image or window; empty without operators.

        Returns:
            per operator ``NAME/score_max`` (largest |score|) and ``NAME/score_std`` of its first head, ``NAME/output``
            (root mean square over that of the values) and ``NAME/step`` (that of the output's change by this step over
            the output's); ``NAME/gate``, mean of a block's |gates|; ``grad_norm/PART``, after clipping.
        """
        values: dict[str, float] = {}
        for name, probe in self._probes.items():
            if probe.output is None:  # an optimizer that calls no hooks
                continue
            q, k, v = (t.float() for t in probe.arguments[:3])
            scale = probe.arguments[6] if len(probe.arguments) > 6 else q.shape[-1] ** -0.5
            scores = q[0, 0] @ k[0, 0].T * scale
            change = self._output(name, probe) - probe.output
            place = name.removesuffix(".operator")
            values |= {
                f"{place}/score_max": scores.abs().max().item(),
                f"{place}/score_std": scores.std().item(),
                f"{place}/output": _ratio(probe.output, v),
                f"{place}/step": _ratio(change, probe.output),
            }
        if values:
            values |= {f"{name}/gate": gate.detach().abs().mean().item() for name, gate in self.gates.items()}
            values |= {f"grad_norm/{part}": norm for part, norm in self._norms.items()}
        self._probes.clear()
        return values

    @torch.no_grad()
    def _output(self, name: str, probe: _Probe) -> Tensor:
        operator = self.operators[name]
        training = operator.training
        operator.eval()  # dropout would differ before and after the step
        try:
            return operator(*probe.arguments).float()
        finally:
            operator.train(training)


def gradient_norms(model: nn.Module) -> dict[str, float]:
    """Norm of the gradient of each part of a model: operators' tensors, gates, projections, feed-forwards, the rest."""
    squares: dict[str, list[Tensor]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            squares[_part(name)].append(parameter.grad.detach().float().square().sum())
    return {part: torch.stack(values).sum().sqrt().item() for part, values in sorted(squares.items())}


def _part(name: str) -> str:
    for pattern, part in _PARTS:
        found = re.search(pattern, name)
        if found:
            return found.expand(part)
    return "rest"


def _ratio(a: Tensor, b: Tensor) -> float:
    return (a.square().mean().sqrt() / b.square().mean().sqrt().clamp(min=1e-12)).item()
