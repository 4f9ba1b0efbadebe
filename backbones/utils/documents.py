"""Reading YAML and JSON that a user gives: bounded in bytes, depth and values, plain values only, one message each."""

import json
import math
import os
import stat
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from .errors import UserError, shown

MAX_BYTES = 2**26  # of JSON; a YAML document is written by hand
MAX_YAML_BYTES = 2**18
MAX_DEPTH = 64
MAX_VALUES = 10**6  # of YAML, after aliases are expanded
_PARSING = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError)


def read_json(path: str | Path, what: str, max_bytes: int = MAX_BYTES) -> Any:
    """Reads JSON; ``what`` names the file's role in messages.

    Args:
        max_bytes: larger files are not read. Above ``MAX_BYTES`` the values' depth and finiteness are not walked
            through: who takes a larger file checks what it uses.

    Raises:
        UserError: missing, no regular file, too large, not UTF-8, not JSON, nested too deeply, a key twice, NaN.
    """
    return parse_json(read_text(path, what, max_bytes), f"{what}: {path}", walk=max_bytes <= MAX_BYTES)


def parse_json(text: str, where: str, walk: bool = True) -> Any:
    """The value of a JSON text; ``where`` begins messages. Raises UserError as ``read_json`` does."""
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise UserError(f"{where} is nested more than {MAX_DEPTH} levels deep. Write it flat.") from None
    except (ValueError, MemoryError) as error:
        raise UserError(f"{where} is not valid JSON ({_reason(error)}). Write it again or give another file.") from None
    if walk:
        check_plain(value, where)
    return value


def read_yaml(path: str | Path, what: str) -> Any:
    """Reads YAML, plain values only; ``what`` names the file's role in messages.

    Raises:
        UserError: missing, no regular file, too large (also through aliases), not UTF-8, not YAML, nested too deeply, a
            key twice, NaN.
    """
    return parse_yaml(read_text(path, what, MAX_YAML_BYTES), f"{what}: {path}")


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text; ``where`` begins messages. Raises UserError as ``read_yaml`` does."""
    if len(text) > MAX_YAML_BYTES:
        raise UserError(f"{where} is longer than {MAX_YAML_BYTES} characters. Shorten it.")
    try:
        value = yaml.load(text, _PlainLoader)  # a SafeLoader
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    except RecursionError:
        raise UserError(f"{where} is nested more than {MAX_DEPTH} levels deep. Write it flat.") from None
    except (yaml.YAMLError, *_PARSING) as error:
        raise UserError(f"{where} is not valid YAML ({_reason(error)}). Correct it.") from None
    check_plain(value, where)
    return value


def read_text(path: str | Path, what: str, max_bytes: int) -> str:
    """A UTF-8 text file whole; only a regular file is opened, so that nothing waits on a pipe or a device."""
    try:
        with open_regular(path) as file:
            if os.fstat(file.fileno()).st_size > max_bytes:
                raise UserError(f"{what}: {path} holds more than {max_bytes} bytes. Give a smaller file.")
            data = file.read()
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{what}: {path} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{what}: {path} does not exist. Check the path.") from None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{what}: {shown(str(path))} is no path ({error}). Check it.") from None


def open_regular(path: str | Path) -> Any:
    """An open binary file; raises UserError unless it is a regular one, without waiting on it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        kind = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(kind):
            name = "a folder" if stat.S_ISDIR(kind) else "a pipe, socket or device"
            raise UserError(f"{path} is {name}, not a file. Give a regular file.")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def check_plain(value: Any, where: str) -> None:
    """Raises UserError when ``value`` is nested too deeply, or holds a number that is not finite or too long."""
    left = [(value, 0)]
    while left:
        item, depth = left.pop()
        if depth > MAX_DEPTH:
            raise UserError(f"{where} is nested more than {MAX_DEPTH} levels deep. Write it flat.")
        if isinstance(item, dict):
            left.extend((part, depth + 1) for part in _parts(item))
        elif isinstance(item, list | tuple | set):
            left.extend((part, depth + 1) for part in item)
        elif isinstance(item, float) and not math.isfinite(item):
            raise UserError(f"{where} holds the number {item}; numbers must be finite.")
        elif isinstance(item, int) and item.bit_length() > 63:
            raise UserError(f"{where} holds {shown(item)}; numbers must have at most 63 bits.")
        elif isinstance(item, str):
            _check_text(item, where)


def _parts(mapping: dict[Any, Any]) -> Iterator[Any]:
    yield from mapping.values()
    yield from mapping


def _check_text(text: str, where: str) -> None:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(f"{where} holds {shown(text)}, half of a character. Correct it.") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError(f"the key {shown(_twice(key for key, _ in pairs))} appears twice")
    return mapping


def _twice(keys: Iterable[Any]) -> Any:
    seen: set[Any] = set()
    return next(key for key in keys if key in seen or seen.add(key))


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


class _PlainLoader(yaml.SafeLoader):
    """A SafeLoader that counts what aliases expand to before it makes anything, and takes each key once."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            self._count(node, {}, 0)
        return node

    def _count(self, node: yaml.Node, known: dict[int, int | None], depth: int) -> int:
        """Values under ``node`` with every alias in full; a node within itself has no end."""
        if depth > MAX_DEPTH:
            raise RecursionError
        if id(node) in known:
            count = known[id(node)]
            if count is None:
                raise UserError("an anchor contains itself. Write the value out.")
            return count
        known[id(node)] = None
        children = node.value if isinstance(node, yaml.SequenceNode) else ()
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        total = 1 + sum(self._count(child, known, depth + 1) for child in children)
        if total > MAX_VALUES:
            raise UserError(f"its aliases stand for more than {MAX_VALUES} values. Write fewer.")
        known[id(node)] = total
        return total

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if len(set(keys)) != len(keys):
            raise UserError(f"the key {shown(_twice(keys))} is given twice. Remove one.")
        return super().construct_mapping(node, deep)
