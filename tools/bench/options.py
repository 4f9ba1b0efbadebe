"""What the user may ask for: devices, number types, shapes. Anything else is a UserError."""

import re

import torch

from backbones.utils.errors import UserError, check_choice, suggest

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WIDTHS = {"tiny": 192, "small": 384, "base": 768}
TOKENS = 197  # of a 224-pixel image in patches of 16, and the class token


def _ffn_shapes(batch: int, width: int) -> list[tuple[int, int, int]]:
    """The inputs of the two activations of a GR-KAN feed-forward."""
    return [(batch, TOKENS, width), (batch, TOKENS, 4 * width)]


SHAPES = {
    "paper": [(64, 1000, 512)],  # of the speed comparison in arXiv 2409.10594
    **{size: _ffn_shapes(128, width) for size, width in WIDTHS.items()},
    **{f"{size}_1024": _ffn_shapes(1024, width) for size, width in WIDTHS.items()},
    "cpu": [(1, 197, 768), (8, 197, 192), (8, 197, 768)],
    "smoke": [(2, 5, 16)],
}
DEFAULT_SHAPES = {"cpu": "cpu", "cuda": "paper,tiny,small,base"}
HEADS = {"tiny": 3, "small": 6, "base": 12}
ATTENTION_SHAPES = {
    **{size: [(128, heads, TOKENS, 64)] for size, heads in HEADS.items()},
    "swin": [(128 * 64, 3, 49, 32)],  # all windows of the first stage of 128 images
    "vitdet": [(4 * 25, 12, 196, 64)],  # all windows of 4 images of 1024 pixels
    "long": [(16, 12, 785, 64), (1, 12, 4096, 64)],  # 448 and 1024 pixels, globally
    "linear": [(1, 12, n, 64) for n in (1024, 2048, 4096, 8192, 16384)],
    "cpu": [(16, 3, 197, 64), (64, 3, 49, 32), (4, 12, 196, 64), (1, 12, 785, 64)],
    "smoke": [(2, 2, 5, 16)],
}
DEFAULT_ATTENTION_SHAPES = {"cpu": "cpu", "cuda": "tiny,small,base,swin,vitdet,long"}


def parse_device(text: str | None) -> torch.device:
    """cpu, cuda or cuda:N; None chooses a GPU when there is one."""
    chosen = text or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", chosen):
        raise UserError(f"--device is {chosen!r}; allowed: 'cpu', 'cuda', 'cuda:N'.{suggest(chosen, ['cpu', 'cuda'])}")
    device = torch.device(chosen)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device is {chosen!r}, but PyTorch sees no GPU. Use --device cpu.")
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise UserError(f"--device is {chosen!r}, but PyTorch sees {torch.cuda.device_count()} GPU(s), from cuda:0 on.")
    return device


def parse_dtypes(text: str, allowed: tuple[str, ...] = tuple(DTYPES)) -> list[str]:
    """Names separated by commas."""
    names = parse_list("--dtype", text)
    for name in names:
        check_choice("--dtype", name, allowed)
    return names


def parse_shapes(text: str, named: dict[str, list[tuple[int, ...]]], letters: str) -> list[tuple[int, ...]]:
    """Names in ``named`` and shapes of one number per letter, such as 8x197x768 for BNC, separated by commas."""
    shapes: list[tuple[int, ...]] = []
    for word in parse_list("--shapes", text):
        if word in named:
            found = named[word]
        elif re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", word) and word.count("x") == len(letters) - 1:
            found = [tuple(map(int, word.split("x")))]
        else:
            raise UserError(
                f"--shapes has {word!r}; allowed: {'x'.join(letters)} such as {show_shape(named['cpu'][0])}, or "
                f"{', '.join(named)}.{suggest(word, named)}"
            )
        shapes += [shape for shape in found if shape not in shapes]
    return shapes


def parse_numbers(flag: str, text: str) -> list[int]:
    """Positive integers separated by commas."""
    words = parse_list(flag, text)
    if not all(re.fullmatch(r"[1-9]\d*", word) for word in words):
        raise UserError(f"{flag} is {text!r}; it must be positive integers separated by commas, such as 1,3.")
    return [int(word) for word in words]


def check_widths(shapes: list[tuple[int, ...]], groups: int) -> None:
    """Raises UserError unless every last dimension is divisible by ``groups``."""
    for shape in shapes:
        if shape[-1] % groups:
            raise UserError(
                f"--shapes has {show_shape(shape)}, whose width {shape[-1]} is not divisible by --groups {groups}. "
                "Change one of them."
            )


def parse_degrees(text: str) -> tuple[int, int]:
    """Degrees m,n of numerator and denominator."""
    if not re.fullmatch(r"\d+,[1-9]\d*", text):
        raise UserError(f"--degrees is {text!r}; it must be m,n with m >= 0 and n >= 1, such as 5,4.")
    m, n = map(int, text.split(","))
    return m, n


def parse_list(flag: str, text: str) -> list[str]:
    """The words of a list separated by commas outside of brackets, each once; an empty list is a UserError."""
    words = [word.strip() for word in re.split(r",(?![^\[]*\])", text) if word.strip()]
    if not words:
        raise UserError(f"{flag} is {text!r}; name at least one.")
    return list(dict.fromkeys(words))


def check_positive(flag: str, value: int) -> int:
    """``value`` when it is 1 or more."""
    if value < 1:
        raise UserError(f"{flag} is {value}; it must be at least 1.")
    return value


def show_shape(shape: tuple[int, ...]) -> str:
    """8x197x768."""
    return "x".join(map(str, shape))
