"""Which parameters take weight decay and at which rate each learns, decided once for all tasks."""

from collections import defaultdict
from typing import Any

from torch import nn

from ..utils.errors import UserError

DERIVED = "derived"
# An operator's tensor moves its output by no more than this times the learning rate in one step of Adam, relative to
# its size. Larger shares learn more in pretraining and lose more in detection: docs/karat_training.md has the figures.
OPERATOR_STEP = 64.0
# What stands behind a gate moves the layer by as much less. Gates start at 0 and stay below this.
GATE = 0.25
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


def operator_rates(trunk: nn.Module, operator_lr: float | str = DERIVED) -> dict[str, float]:
    """Factors of the learning rate of KArAt's tensors, by their name in the backbone.

    Adam moves each number of a tensor by about the rate, and an operator adds up N·G·r of them that may agree in sign.
    So a step that a linear layer bears can replace an operator's output. ``derived`` is
    min(1, OPERATOR_STEP / sensitivity), with the sensitivity that follows from N, G, r and the order
    (``KArAtOperator.sensitivities``): one step moves the output of every operator by the same share. Behind a gate it
    is OPERATOR_STEP / GATE.

    Args:
        trunk: a Karvis backbone.
        operator_lr: ``derived``, or one positive factor for all of them; 1 is arXiv 2503.10632's one rate for all.

    Raises:
        UserError: for another word, and a factor that is not positive.
    """
    factor = check_operator_lr(operator_lr)
    step = OPERATOR_STEP / (GATE if trunk.config.attention.blend == "add" else 1.0)
    return {
        f"{operator_name}.{name}": min(1.0, step / max(sensitivity, 1e-12)) if factor is None else factor
        for operator_name, operator in trunk.operators().items()
        for name, sensitivity in operator.sensitivities().items()
    }


def parameter_groups(
    model: nn.Module,
    trunk: nn.Module,
    prefix: str = "",
    *,
    weight_decay: float,
    layer_decay: float = 1.0,
    operator_lr: float | str = DERIVED,
    decay_biases: bool = False,
    norms: tuple[type[nn.Module], ...] = (),
) -> list[dict[str, Any]]:
    """An optimizer's groups: ``params``, ``weight_decay``, and ``lr_scale``, a factor of the learning rate.

    Args:
        model: what is trained; frozen parameters are left out.
        trunk: the Karvis backbone within it, and ``prefix``, what its parameters' names begin with there.
        layer_decay: r; the backbone's layer i of a depth d learns at r^(d + 1 - i).
        operator_lr: see ``operator_rates``.
        decay_biases: decay every tensor but those of norms and what the backbone's ``no_weight_decay`` names; else
            also none of a single axis.
        norms: further modules to take for norms, beside PyTorch's.
    """
    rates = {prefix + name: rate for name, rate in operator_rates(trunk, operator_lr).items()}
    undecayed = {prefix + name for name in trunk.no_weight_decay()} | _of_norms(model, (*_NORMS, *norms))
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = rates.get(name, 1.0)
        if name.startswith(prefix):
            scale *= layer_decay ** (trunk.depth + 1 - trunk.layer_id(name.removeprefix(prefix)))
        decays = name not in undecayed and (decay_biases or parameter.ndim > 1)
        groups[scale, weight_decay if decays else 0.0].append(parameter)
    return [{"params": p, "lr_scale": scale, "weight_decay": decay} for (scale, decay), p in groups.items()]


def describe_rates(trunk: nn.Module, operator_lr: float | str = DERIVED) -> str:
    """A line of its own: the range of each kind of tensor's factor over the blocks; empty without operators."""
    by_kind: dict[str, list[float]] = defaultdict(list)
    for name, rate in operator_rates(trunk, operator_lr).items():
        by_kind[name.rpartition("operator.")[2]].append(rate)
    if not by_kind:
        return ""
    shown = [
        f"{kind} {min(rates):.2g}" + (f" to {max(rates):.2g}" if max(rates) > min(rates) * 1.01 else "")
        for kind, rates in by_kind.items()
    ]
    how = "derived from tokens, G, rank and order" if operator_lr == DERIVED else "as set"
    return f"\nKArAt's tensors learn at these shares of the rate ({how}): {', '.join(shown)}"


def check_operator_lr(value: float | str, name: str = "operator_lr") -> float | None:
    """The factor that ``value`` says, None for ``derived``; UserError, which calls it ``name``, for what is neither."""
    if value == DERIVED:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not 0 < number < float("inf") or isinstance(value, bool):
        raise UserError(
            f"{name} is {value!r}; it must be {DERIVED!r}, or a positive factor of the learning rate: 1.0 is the "
            "paper's one rate for all tensors."
        )
    return number


def _of_norms(model: nn.Module, norms: tuple[type[nn.Module], ...]) -> set[str]:
    return {
        f"{module_name}.{name}"
        for module_name, module in model.named_modules()
        if isinstance(module, norms)
        for name, _ in module.named_parameters(recurse=False)
    }
