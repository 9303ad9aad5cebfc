"""Ctrl-C and termination end a run between two steps, where its state is whole."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType


class Stopped(Exception):
    """By a signal; ends an example with status 130."""


class Stop:
    """`requested` turns True at the first SIGINT or SIGTERM; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.requested = False

    def check(self) -> None:
        """Raises Stopped where it was requested."""
        if self.requested:
            raise Stopped

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __enter__(self) -> Stop:
        self._before = {number: signal.signal(number, self._request) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
