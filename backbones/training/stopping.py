"""Stopping between two steps: signals become a request, and when to save is decided for all processes alike."""

import shlex
import signal
import sys
import threading
import time
from types import FrameType, TracebackType

from .processes import agree

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Pace:
    """Asked after every step: is it time to save, and has someone asked the run to stop?

    While it is entered, SIGTERM and SIGINT are requests that the loop answers; a second SIGINT interrupts at once.

    Args:
        save_minutes: save when this long has passed since the last save; 0 = never for the time.
        save_steps: save every this many steps; 0 = never for the count.
    """

    def __init__(self, save_minutes: float = 0.0, save_steps: int = 0):
        self._seconds, self._steps = 60 * save_minutes, save_steps
        self._saved = time.monotonic()
        self.signal = 0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Pace":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.signal == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number

    def after_step(self, done: int) -> bool:
        """Whether to save now; the same answer in every process, each of which must ask. Sets ``signal`` alike."""
        late = bool(self._seconds) and time.monotonic() - self._saved >= self._seconds
        due = late or (self._steps > 0 and done % self._steps == 0)
        self.signal, save = agree(self.signal, int(due or self.signal > 0))
        return bool(save)

    def saved(self) -> None:
        self._saved = time.monotonic()

    def stop(self, done: int) -> None:
        """Ends the program as a signal that stopped it does (143 or 130), after the loop has saved."""
        told = f"stopped after step {done}, which is saved. Continue with: {resume_command()}"
        print(told, file=sys.stderr, flush=True)
        raise SystemExit(128 + self.signal)


def resume_command() -> str:
    """This command, as it continues a run."""
    words = [word for word in sys.argv if word != "--resume"]
    return shlex.join(["python", words[0], "--resume", *words[1:]])
