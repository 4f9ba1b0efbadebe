"""Weights in and out: files or timm models into a backbone at any size, with a report of what matched."""

import math
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn import functional as F

from .config import BackboneConfig
from .header import parse_header
from .layers.attention import FrozenScoresLinear, split_fused
from .layers.gr_kan import GroupRational, start_coefficients
from .layers.resample import Grid, resample_tokens
from .layers.starts import STARTS
from .utils.digest import check_weights
from .utils.errors import UserError, escaped
from .utils.files import save_weights

_ANCHOR = "patch_embed.proj.weight"  # every ViT has it: what stands before it is the wrapper's prefix
_WRAPPERS = ("model", "state_dict", "model_ema", "state_dict_ema", "teacher")


@dataclass
class MatchReport:
    """What ``load_weights`` did; ``share`` is the part of the backbone's parameters (classifier apart) it filled."""

    source: str
    arch: str
    total: int = 0
    filled: int = 0
    matched: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    started: list[str] = field(default_factory=list)
    note: str = ""

    @property
    def share(self) -> float:
        return self.filled / max(1, self.total)

    def __str__(self) -> str:
        lines = [
            f"weights {self.source} -> {self.arch}: {self.share:.1%} of {self.total / 1e6:.2f}M backbone parameters",
            f"  matched   {len(self.matched)} tensors",
        ]
        for what in ("resized", "missing", "left_out"):
            names = getattr(self, what)
            shown = ", ".join(names[:6]) + (f", ... ({len(names) - 6} more)" if len(names) > 6 else "")
            lines.append(f"  {what.replace('_', ' '):<9} {len(names)}{': ' if names else ''}{shown}")
        if self.started:
            lines.append(f"  started   {len(self.started)}: {self.note}")
        return "\n".join(lines)


def load_weights(network: nn.Module, source: str | Path, min_match: float = 0.9, quiet: bool = False) -> MatchReport:
    """Fills a backbone from a file or a timm model, resampling what belongs to another number of tokens.

    A ViT's weights keep the ViT's function where the backbone can hold it: in GR-KAN F1 becomes the identity and F2
    GELU, whatever ``ffn.init`` says, up to GELU's fit; where KArAt stands beside the softmax, gates stay at 0.

    Args:
        network: from ``create_backbone``.
        source: safetensors or .pth file (tensors only), or a timm model name.
        min_match: least share of the backbone's parameters, the classifier apart, that must be filled.
        quiet: do not print the report.

    Raises:
        UserError: when the source cannot be read, fills less than ``min_match``, or blends KArAt with the softmax in
            another way than the backbone; the network is then unchanged.
    """
    state, saved = read_weights(source)
    for name, module in network.named_modules():
        if isinstance(module, FrozenScoresLinear):
            state |= split_fused(state, f"{name}.")
    target = network.state_dict()
    report = MatchReport(str(source), network.config.arch)
    new: dict[str, Tensor] = {}
    starts = {**_rationals_of_a_vit(state, network), **closed_gates(state, target, str(source))}
    for name, current in target.items():
        if name in starts:
            new[name] = starts[name]
            report.started.append(name)
            report.total += current.numel()
            report.filled += current.numel()
            continue
        tensor = state.get(name)
        fitted = None if tensor is None else _fit(name, tensor, current, network, saved)
        in_classifier = name.startswith("head.")
        report.total += 0 if in_classifier else current.numel()
        if fitted is None:
            report.missing.append(name if tensor is None else f"{name} {_shapes(tensor, current)}")
            continue
        new[name] = fitted
        report.filled += 0 if in_classifier else current.numel()
        resized = tensor.shape != current.shape or fitted is not tensor
        (report.resized if resized else report.matched).append(
            f"{name} {_shapes(tensor, current)}" if resized else name
        )
    report.left_out = [name for name in state if name not in new]
    report.note = _kept_function(report.started, network, str(source))
    if report.share < min_match:
        raise UserError(
            f"{report}\nThat is less than {min_match:.0%}: is this the checkpoint of another model? "
            f"Give one that fits, or accept it with weights_min_match={math.floor(report.share * 100) / 100}."
        )
    with torch.no_grad():
        for name, tensor in new.items():
            target[name].copy_(tensor)
    if not quiet:
        print(escaped(report), flush=True)
    return report


def _rationals_of_a_vit(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Coefficients that give GR-KAN the function of a ViT's MLP (GELU); empty unless an MLP meets a GR-KAN.

    Degrees below (5, 4) hold no GELU: they keep their start, and the report counts them as missing.
    """
    first = "blocks.0.mlp."
    if f"{first}fc1.weight" not in state or f"{first}act1.weight_numerator" in state:
        return {}
    ffn, starts = network.config.ffn, {}
    if ffn.degrees[0] < 5 or ffn.degrees[1] < 4:
        return {}
    for prefix, module in network.named_modules():
        if isinstance(module, GroupRational):
            function = "identity" if prefix.endswith("act1") else "gelu"
            a, b = start_coefficients(function, ffn.denominator, ffn.degrees)
            starts[f"{prefix}.weight_numerator"] = a.expand_as(module.weight_numerator)
            starts[f"{prefix}.weight_denominator"] = b.expand_as(module.weight_denominator)
    return starts


def closed_gates(state: Mapping[str, Tensor], target: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Gates that the weights lack, with the operators behind them, as they start: closed, so that the function is kept.

    Args:
        state, target: the weights' tensors and the network's, or those of what it is part of, by name.
        source: what messages call the weights.

    Raises:
        UserError: for operators without gates where the backbone has gates, the reverse, and gates of other heads.
    """
    starts: dict[str, Tensor] = {}
    for attention in _attentions(target):
        gate = f"{attention}gate"
        has, needs = (_operator_names(names, attention) for names in (state, target))
        if needs and has and (gate in state) != (gate in target):
            stored, wanted = ("add", "replace") if gate in state else ("replace", "add")
            raise UserError(
                f"{source} was trained with attention.blend {stored!r}, see {attention[:-1]}, and the backbone has "
                f"{wanted!r}: its function would be lost. Set attention.blend={stored!r}."
            )
        if gate in target and gate in state and state[gate].shape != target[gate].shape:
            raise UserError(
                f"{source} has {len(state[gate])} gates in {attention[:-1]}, and attention.heads gives "
                f"{len(target[gate])} heads to the operator. Set attention.heads as it was trained."
            )
        if gate in target and gate not in state:
            starts |= {name: target[name] for name in (gate, *needs)}
    return starts


def _attentions(target: Mapping[str, Tensor]) -> list[str]:
    """What the names of each attention's tensors begin with, such as ``blocks.0.attn.``."""
    return list(dict.fromkeys(name.split("attn.")[0] + "attn." for name in target if "attn." in name))


def _operator_names(names: Iterable[str], attention: str) -> list[str]:
    """The tensors of an attention's own operator, or of the one that all share."""
    shared = attention.partition("blocks.")[0]
    own = [name for name in names if name.startswith(f"{attention}operator.")]
    return own or [name for name in names if name.startswith(f"{shared}operator.")]


def _kept_function(started: Sequence[str], network: nn.Module, source: str) -> str:
    """What the tensors that the weights lack were given, in words."""
    notes = []
    if any(name.endswith("weight_numerator") for name in started):
        gelu = STARTS[network.config.ffn.denominator]["gelu"]
        notes.append(
            f"F1 = identity, F2 = GELU, the activation of {source}, "
            f"within {gelu.error:.1e} on [-{gelu.limit:g}, {gelu.limit:g}]"
        )
    if any(name.endswith(".gate") for name in started):
        notes.append("gates of KArAt at 0, which keeps the softmax network's function exactly")
    return "; ".join(notes)


def save_backbone(path: str | Path, network: nn.Module, **metadata: Any) -> None:
    """Writes a network's weights as safetensors, with its config (and ``metadata``) in the header."""
    save_weights(path, network.state_dict(), {"config": network.config.to_dict(), **metadata})


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The header that ``save_backbone`` wrote; empty for files from elsewhere."""
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}. It is missing, damaged or not a safetensors file.") from None
    return parse_header(metadata, path)


def read_weights(source: str | Path) -> tuple[dict[str, Tensor], BackboneConfig | None]:
    """Reads a state dict with the wrapper's prefix removed, and the config it was saved with when it says so."""
    path = Path(source)
    if path.is_file():
        if path.suffix == ".safetensors":
            metadata = read_metadata(path)
            state = read_tensors(path)
        else:
            metadata, state = {}, _read_torch(path)
        config = metadata.get("backbone", metadata.get("config"))
        config = BackboneConfig.from_dict(config) if isinstance(config, Mapping) and "arch" in config else None
        state = _strip_prefix(state, path)
        check_finite(state, str(path))
        return state, config
    return _read_timm(str(source)), None


def check_finite(state: Mapping[str, Tensor], source: str) -> None:
    """Raises UserError naming the first tensor that holds NaN or infinity."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{source}: {name} holds NaN or infinity. Use weights from before training diverged.")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; those of a file with a digest are the ones that were written."""
    from safetensors.torch import load_file

    check_weights(path, required="karvis_format" in read_metadata(path))
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"cannot read {path}: {error}. The file is damaged; copy it again.") from None


def read_state(source: str | Path) -> dict[str, Tensor]:
    """The tensors by name of a safetensors file, or of a .pth file that holds nothing else but plain values."""
    path = Path(source)
    if not path.is_file():
        raise UserError(f"the checkpoint {path} does not exist. Check the path.")
    return read_tensors(path) if path.suffix == ".safetensors" else _read_torch(path)


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} holds more than tensors, and nothing else is unpickled. "
            "Save its state dict alone: torch.save({'model': state_dict}, FILE) or safetensors."
        ) from None
    except OSError:
        raise
    except Exception as error:  # torch's reader raises errors of many kinds, some with advice that is dangerous
        raise UserError(f"cannot read {path} ({type(error).__name__}). The file is damaged; copy it again.") from None
    while isinstance(state, Mapping) and not any(isinstance(v, Tensor) for v in state.values()):
        inner = next((state[key] for key in _WRAPPERS if isinstance(state.get(key), Mapping)), None)
        if inner is None:
            break
        state = inner
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, Mapping) else {}
    if not tensors:
        raise UserError(f"{path} holds no state dict. Give a file with tensors by name.")
    return tensors


def _read_timm(name: str) -> dict[str, Tensor]:
    import timm

    if not timm.is_model(name):
        known = timm.list_models(f"*{name.split('.', maxsplit=1)[0][:12]}*")[:5]
        hint = f" timm has: {', '.join(known)}." if known else ""
        raise UserError(f"weights {name!r} is neither a file nor a timm model.{hint} Check the path or the name.")
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except UserError:
        raise
    except Exception as error:  # the hub's clients raise errors of many libraries
        raise UserError(
            f"timm could not fetch {name!r} ({type(error).__name__}: {str(error).splitlines()[0][:120]}). "
            "Check the network, or give a file instead."
        ) from None


def _strip_prefix(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    anchors = [name for name in state if name.endswith(_ANCHOR)]
    if not anchors:
        raise UserError(f"{path} has no {_ANCHOR}: it is not the checkpoint of a ViT. Give one that is.")
    prefix = min(anchors, key=len)[: -len(_ANCHOR)]
    return {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}


def _fit(name: str, tensor: Tensor, current: Tensor, network: nn.Module, saved: BackboneConfig | None) -> Tensor | None:
    """``tensor`` in the shape of ``current``: itself, resampled over tokens, or None when it belongs elsewhere."""
    if name == "pos_embed":
        return _fit_pos_embed(tensor, current, network.config, saved)
    operator = next((o for o in network.operators() if name.startswith(f"{o}.")), None)
    if operator is not None:
        return _fit_operator(operator, name[len(operator) + 1 :], tensor, current, network, saved)
    leaf = name.rpartition(".")[2]
    if tensor.shape == current.shape:
        return tensor
    if leaf in ("rel_pos_h", "rel_pos_w") and tensor.dim() == 2 and tensor.shape[1] == current.shape[1]:
        return F.interpolate(tensor.T[None].float(), size=current.shape[0], mode="linear")[0].T
    return None


def _fit_pos_embed(
    tensor: Tensor, current: Tensor, config: BackboneConfig, saved: BackboneConfig | None
) -> Tensor | None:
    grid_prefix = _token_layout(tensor.shape[1], saved.grid_size if saved else None) if tensor.dim() == 3 else None
    if grid_prefix is None or tensor.shape[2] != current.shape[2]:
        return None
    old, old_prefix = grid_prefix
    prefix = config.prefix(0)
    if (old, old_prefix) == (config.grid_size, prefix):
        return tensor
    if old == config.grid_size:
        grid = tensor[:, old_prefix:]
    else:
        antialias = config.pos_embed_antialias
        grid = resample_abs_pos_embed(tensor[:, old_prefix:], list(config.grid_size), list(old), 0, antialias=antialias)
    # Checkpoints without a position for the class token give it none.
    head = tensor[:, :old_prefix] if old_prefix else torch.zeros_like(tensor[:, :1])
    return torch.cat([head[:, :prefix], grid], 1)


def _fit_operator(
    owner: str, leaf: str, tensor: Tensor, current: Tensor, network: nn.Module, saved: BackboneConfig | None
) -> Tensor | None:
    operator = network.operators()[owner]
    axes, keep_sum = operator.token_axis(leaf)
    tokens = {tensor.dim() + axis for axis in axes}
    others = [d for d in range(tensor.dim()) if d not in tokens]
    if tensor.dim() != current.dim() or any(tensor.shape[d] != current.shape[d] for d in others):
        return None
    for axis in axes:
        layout = _token_layout(tensor.shape[axis], _saved_grid(owner, saved))
        if layout is None:
            return None
        old, old_prefix = layout
        if (old, old_prefix) != (operator.grid, operator.prefix):
            moved = tensor.transpose(axis, -1)
            moved = resample_tokens(moved, old, operator.grid, old_prefix, operator.prefix, keep_sum)
            tensor = moved.transpose(axis, -1)
    return tensor


def _saved_grid(name: str, saved: BackboneConfig | None) -> Grid | None:
    if saved is None:
        return None
    if name.startswith("blocks."):
        return saved.token_grid(int(name.split(".")[1]))
    return saved.token_grid(next((i for i in range(saved.depth) if saved.is_karat(i)), 0))


def _token_layout(count: int, grid: Grid | None) -> tuple[Grid, int] | None:
    """(grid, prefix tokens) of a token axis: the saved grid when known, else a square one after 0 to 2 tokens."""
    if grid is not None and 0 <= count - grid[0] * grid[1] <= 2:
        return grid, count - grid[0] * grid[1]
    for prefix in (1, 0, 2):
        side = math.isqrt(max(0, count - prefix))
        if side and side * side == count - prefix:
            return (side, side), prefix
    return None


def _shapes(old: Tensor, new: Tensor) -> str:
    return f"{list(old.shape)}->{list(new.shape)}"
