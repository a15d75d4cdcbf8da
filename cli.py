"""What every command of this project shares: one-line errors, and files that appear whole or not at all."""

import argparse
import contextlib
import errno
import io
import os
import pathlib
import shutil
import sys
import tempfile

import torch
from safetensors import SafetensorError


class UserError(Exception):
    """A mistake the user can mend. The message says what is wrong, where, and what to do."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are `UserError`s, so that a wrong option also ends in one line."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message):
        raise UserError(f"{message} ({self.prog} --help lists the options)")


def new_file(text):
    """The path of a file to write, for argparse: a folder, or a place that cannot be written, is refused at once."""
    path = pathlib.Path(text)
    if path.is_dir():
        raise UserError(f"{path} is a folder; name the file to write, such as {path / 'NAME'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except OSError as e:
        raise UserError(f"{path} cannot be written ({e.strerror}); choose another place") from e


def run_command(main, relief="close other programs, or choose a smaller model"):
    """Calls `main()`; what a user or a machine can cause ends as `error: ...` on stderr with exit status 2.

    relief: what to do when memory runs out.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed from the start: `python train.py >&-`
            setattr(sys, name, open(os.devnull, "w"))
    if isinstance(sys.stdout, io.TextIOWrapper):  # a character that the terminal lacks is no reason to stop
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            main()
        finally:
            flush_stdout()
    except BrokenPipeError:  # `python sample.py ... | head`: nobody is left to read a message
        sys.exit(1)
    except UserError as e:
        message = str(e)
    except OSError as e:
        where = f": {e.filename}" if e.filename else ""
        advice = "; free some space or choose another folder" if e.errno == errno.ENOSPC else ""
        message = f"{e.strerror or e}{where}{advice}"
    except (torch.OutOfMemoryError, MemoryError):
        message = f"out of memory; {relief}"
    except (RuntimeError, SafetensorError) as e:  # how the CPU allocator and safetensors report the machine's limits
        if "can't allocate memory" in str(e):
            message = f"out of memory; {relief}"
        elif "No space left" in str(e):
            message = "no space left on the device; free some space or choose another folder"
        else:
            raise
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    else:
        return
    print("error: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def flush_stdout():
    """Flushes what was printed while a failure can still be reported; Python's own flush at exit only complains."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the flush at exit has nothing to say
        raise


@contextlib.contextmanager
def written_whole(path):
    """Yields a path beside `path` to write a file or folder to; renamed to `path` on success, removed on failure.

    An existing `path` is replaced (where it is a link, what that points to), and stays as it was until then; raises
    UserError instead of replacing a folder by a file. A folder is moved aside first, as no file system replaces a full
    one; killed between these two renames, the old one is left as `.NAME.PID.old`.
    """
    named, path = path, pathlib.Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    _remove(beside)
    try:
        yield beside
        if path.is_dir() and not beside.is_dir():  # nobody means to lose a folder and all that is in it
            raise UserError(f"{named} is a folder; name a file")
        for file in [beside, *beside.rglob("*")]:  # on the disk before it bears the name
            if file.is_file():
                with open(file, "rb") as f:
                    os.fsync(f.fileno())
        if path.is_dir():  # a folder cannot be renamed onto a full one
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            os.rename(path, old)
            os.rename(beside, path)
            _remove(old)
        else:
            os.replace(beside, path)
    except OSError as e:  # a full disk's error names no file, and others one that the user has never heard of
        if e.filename is None or beside.name in str(e.filename):
            e.filename = str(named)
        raise
    finally:
        _remove(beside)


def _remove(path):
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
