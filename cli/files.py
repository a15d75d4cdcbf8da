"""Files and folders that appear whole or not at all, and the checks before something is written."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator

from cli.errors import UserError


@contextlib.contextmanager
def written_whole(path: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a path beside `path` to write to; renamed to `path` on success, removed on failure.

    Works for a file and for a folder. An existing `path` stays as it was until the rename replaces
    it (where it is a link, what it points to). Raises UserError instead of replacing a folder by a
    file. No file system renames onto a full folder, so a folder is first moved aside; a process
    killed between these two renames leaves the old one as `.NAME.PID.old`.
    """
    named = path
    path = pathlib.Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    remove(beside)
    try:
        yield beside
        if path.is_dir() and not beside.is_dir():
            raise UserError(f"{named} is a folder; name a file")
        for file in [beside, *beside.rglob("*")]:
            if file.is_file():
                _let_others_read(file)
                _flush_to_disk(file)
        if path.is_dir():
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            path.rename(old)
            beside.rename(path)
            remove(old)
        else:
            beside.replace(path)
    except OSError as e:
        unknown_to_the_user = e.filename is None or beside.name in str(e.filename)
        if unknown_to_the_user:
            e.filename = str(named)
        raise
    finally:
        remove(beside)


def _beside(path):
    return path.with_name(f".{path.name}.{os.getpid()}.unfinished")


def _let_others_read(file):  # as the umask allows; safetensors keeps its files from all others
    umask = os.umask(0)  # it cannot be read otherwise
    os.umask(umask)
    file.chmod(0o666 & ~umask)


def _flush_to_disk(file):
    with file.open("rb") as f:
        os.fsync(f.fileno())


def remove(path: pathlib.Path) -> None:
    """Removes a file or a folder, of a link only the link; nothing where there is none."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def is_leftover(path: pathlib.Path) -> bool:
    """Whether `path` is what a process that was killed in `written_whole` has left."""
    return re.fullmatch(r"\..+\.\d+\.(unfinished|old)", path.name) is not None


def new_file(text: str) -> pathlib.Path:
    """The path of a file to write, for argparse. UserError for a folder or an unwritable place."""
    path = pathlib.Path(text)
    if path.is_dir():
        raise UserError(f"{path} is a folder; name the file to write, such as {path / 'NAME'}")
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} is a device or the like; name a file to write")
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            _beside(path).stat()  # fails where this name is too long
        with tempfile.TemporaryFile(dir=path.parent):
            return path
    except OSError as e:
        raise UserError(f"{path} cannot be written ({e.strerror}); choose another place") from e


def check_new(path: pathlib.Path) -> None:
    """Raises UserError unless `path` is missing or an empty folder: nothing is overwritten."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists and is no empty folder; remove it or choose another --out")


def read_json(path: pathlib.Path) -> dict:
    """The object in a JSON file. UserError if it holds anything else."""
    return json_object(path.read_bytes(), path)


def json_object(text: bytes, path: pathlib.Path) -> dict:
    """The object in a JSON file's text. UserError, naming `path`, if it holds anything else."""
    try:
        content = json.loads(text.decode())
        json.dumps(content, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not valid JSON ({e}); correct it, or fetch it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {json.dumps(content)[:40]}")
    return content


def write_json(content: dict, path: pathlib.Path) -> None:
    """Writes an object as JSON, whole."""
    with written_whole(path) as beside:
        beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
