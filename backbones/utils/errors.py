"""One way for every command to end on bad input: a message, a non-zero exit code, a traceback only with --debug."""

import difflib
import itertools
import os
import reprlib
import sys
import traceback
import unicodedata
from collections.abc import Callable, Iterable, Mapping

from .environment import describe_environment

DEBUG_FLAG = "--debug"


class UserError(ValueError):
    """A problem the user can fix. The message says what came, what is allowed and what to do."""


class _Shown(reprlib.Repr):
    """repr of what a user gave: a few items of a few levels, whatever its size."""

    def __init__(self):
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother, self.maxlong = 3, 120, 120, 40

    def repr1(self, x: object, level: int) -> str:
        if isinstance(x, int) and x.bit_length() > 128:
            return f"an integer of {x.bit_length()} bits"
        if isinstance(x, Mapping) and type(x) is not dict:
            x = dict(itertools.islice(x.items(), self.maxdict + 1))
        return super().repr1(x, level)


def shown(value: object, limit: int = 240) -> str:
    """``value`` for a message: its repr, at most ``limit`` characters, without control characters."""
    text = escaped(_Shown().repr(value))
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


_JOINERS = "\u200c\u200d"  # within words of some scripts, and emoji


def escaped(text: object) -> str:
    """``text`` with control characters, bidirectional overrides and lone surrogates as escapes; line breaks stay."""
    text = str(text)
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in "\n\t" or not _is_control(c) else _escape(c) for c in text)


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp") and character not in _JOINERS


def _escape(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def check_name(what: str, value: object, longest: int = 256) -> None:
    """Raises UserError unless ``value`` is a text of 1 to ``longest`` characters, none of which controls a terminal."""
    if not isinstance(value, str) or not 1 <= len(value) <= longest or any(map(_is_control, value)):
        raise UserError(
            f"{what} is {shown(value)}; it must be a text of 1 to {longest} characters without control characters."
        )


def suggest(word: str, allowed: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for the allowed name nearest to ``word``, or ``""``."""
    nearest = difflib.get_close_matches(str(word)[:100], [str(a) for a in allowed], n=1, cutoff=0.5)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


def check_choice(setting: str, value: object, allowed: Iterable[object]) -> None:
    """Raises UserError naming ``setting``, the value and the allowed ones unless ``value`` is one of them."""
    allowed = list(allowed)
    if value not in allowed:
        names = ", ".join(repr(a) for a in allowed)
        hint = suggest(value, map(str, allowed)) if isinstance(value, str) else ""
        raise UserError(f"{setting} is {shown(value)}; allowed: {names}.{hint}")


def check_keys(where: str, keys: Iterable[str], allowed: Iterable[str]) -> None:
    """Raises UserError naming the first of ``keys`` that is not ``allowed`` and the nearest valid name."""
    allowed = list(allowed)
    for key in keys:
        if key not in allowed:
            hint = suggest(key, allowed) if isinstance(key, str) else ""
            raise UserError(f"{where} has no key {shown(key)}.{hint} Valid keys: {', '.join(allowed)}.")


def describe(error: BaseException) -> str | None:
    """The message for an error a user can act on, or None when the error is a defect of the program."""
    text = str(error)
    if isinstance(error, UserError) or f"{__name__}.{UserError.__name__}: " in text:
        # An exception of a worker or another process arrives as its traceback; the message follows the class name.
        return text.rsplit(f"{UserError.__name__}: ", 1)[-1].strip() if "Traceback" in text else text
    return describe_environment(error)


def run_main(main: Callable[[list[str]], int | None]) -> None:
    """Runs ``main(argv)`` as a command and exits: 0 done, 2 a problem of the user's, 130 interrupted, 1 a defect."""
    argv = sys.argv[1:]
    debug = DEBUG_FLAG in argv
    argv = [a for a in argv if a != DEBUG_FLAG]
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding lacks ends no run
    try:
        code = main(argv) or 0
        sys.stdout.flush()
        sys.exit(code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        message = describe(error)
        if debug:
            print(escaped(traceback.format_exc()), file=sys.stderr)
        defect = f"{type(error).__name__}: {error} (a defect of this program; run again with {DEBUG_FLAG})"
        print(f"error: {escaped(defect if message is None else message)}", file=sys.stderr)
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at its end
        sys.exit(1 if message is None else 2)
