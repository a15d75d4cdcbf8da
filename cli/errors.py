"""A user's mistake ends with one line, `error: ...`, and exit status 2; never with a traceback."""

import argparse
import contextlib
import errno
import io
import math
import os
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Never

import torch
from safetensors import SafetensorError


class UserError(Exception):
    """A mistake that the user can fix. The message says what is wrong, where, and what to do."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UserError, so that a wrong option ends in one line as well."""

    def __init__(self, **kwargs):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(formatter_class=formatter, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> Never:
        """Raises UserError with argparse's message."""
        raise UserError(f"{message} ({self.prog} --help lists the options)")


def positive(kind: type, *words: str) -> Callable:
    """A converter for argparse that takes an int or a float above zero, or one of `words`."""

    def read(text):
        if text in words:
            return text
        value = kind(text)
        if not 0 < value < math.inf:
            raise ValueError
        return value

    # argparse prints: invalid int above zero value
    read.__name__ = " or ".join((f"{kind.__name__} above zero", *words))
    return read


def require_matplotlib() -> None:
    """Raises UserError where matplotlib is missing; called early, as a plot comes at the end."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as e:
        raise UserError("--plot needs matplotlib: pip install matplotlib") from e


def run_command(
    main: Callable, relief: str = "close other programs, or choose a smaller model"
) -> None:
    """Calls `main()`; for what a user or the machine caused prints `error: ...` and exits with 2.

    relief: what to do when memory runs out.
    """
    prepare_streams()
    try:
        try:
            main()
        finally:
            flush_stdout()
    except BrokenPipeError:  # `python sample.py ... | head`: nobody is left to read a message
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except Exception as e:
        message = message_for(e, relief)
        if message is None:
            raise
        print("error: " + " ".join(message.split()), file=sys.stderr)
        sys.exit(2)


def message_for(error: Exception, relief: str) -> str | None:
    """What to print for an exception; None if it is a programmer's mistake."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        full = error.errno == errno.ENOSPC
        advice = "; free some space or choose another folder" if full else ""
        return f"{error.strerror or error}{where}{advice}"
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return f"out of memory; {relief}"
    if isinstance(error, RuntimeError | SafetensorError):
        # The CPU allocator and safetensors have no error classes of their own for these
        if "can't allocate memory" in str(error):
            return f"out of memory; {relief}"
        failed = re.search(r"\(os error (\d+)\)", str(error))  # safetensors writes so
        if failed:
            return f"{os.strerror(int(failed[1]))}; free some space or choose another folder"
        if "No space left" in str(error):
            return "no space left on the device; free some space or choose another folder"
    return None


def prepare_streams() -> None:
    """Makes printing safe where a stream is closed or its encoding lacks a character."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed from the start: `python train.py >&-`
            setattr(sys, name, pathlib.Path(os.devnull).open("w"))  # noqa: SIM115, open to the end
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def flush_stdout() -> None:
    """Flushes now, so that a full disk is reported as an error."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError):  # so that the flush at exit does not fail again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise
