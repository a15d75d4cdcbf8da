"""Files and folders are whole or absent, and what cannot be written is refused early."""

import os
import pathlib

import pytest
import torch
from helpers import ending
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import save_file

from cli import files
from cli.errors import UserError
from cli.files import new_file, written_whole


class Crash(Exception):
    pass


def put(path, content):
    """Makes a file of bytes, or a folder of such (folders within folders too)."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.mkdir()
        for name, inner in content.items():
            put(path / name, inner)


def found(path):
    """What `put` made."""
    return path.read_bytes() if path.is_file() else {p.name: found(p) for p in path.iterdir()}


content = st.recursive(
    st.binary(max_size=20), lambda inner: st.dictionaries(st.sampled_from("abc"), inner)
)


@given(before=st.none() | content, after=content, crash=st.booleans())
def test_what_was_there_stays_whole_until_the_new_is(tmp_path_factory, before, after, crash):
    assume(before is None or type(before) is type(after))  # the other cases are the next tests
    folder = tmp_path_factory.mktemp("whole")
    path = folder / "thing"
    if before is not None:
        put(path, before)
    try:
        with written_whole(path) as beside:
            assert beside.parent == path.parent  # on one file system, so that it can be renamed
            put(beside, after)
            assert (found(path) if path.exists() else None) == before
            if crash:
                raise Crash
    except Crash:
        after = before
    assert found(folder) == ({} if after is None else {"thing": after}), "something was left beside"


def test_a_folder_does_not_replace_a_file(tmp_path):
    (tmp_path / "out").write_bytes(b"mine")
    with pytest.raises(OSError), written_whole(tmp_path / "out") as beside:
        beside.mkdir()
    assert found(tmp_path) == {"out": b"mine"}


def test_a_file_does_not_replace_a_folder(tmp_path):
    put(tmp_path / "out", {"mine": b"1"})
    out = tmp_path / "out"
    with pytest.raises(UserError, match="out is a folder"), written_whole(out) as beside:
        beside.write_bytes(b"2")
    assert found(tmp_path) == {"out": {"mine": b"1"}}


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys):
    put(tmp_path / "folder", {"mine": b"1"})
    assert ending(capsys, lambda: new_file(tmp_path / "folder"))[0] == 2
    assert ending(capsys, lambda: new_file("/proc/nowhere/file"))[0] == 2
    assert ending(capsys, lambda: new_file(tmp_path / "folder" / "mine" / "file"))[0] == 2
    assert "is a device" in ending(capsys, lambda: new_file("/dev/null"))[1]
    assert "name too long" in ending(capsys, lambda: new_file(str(tmp_path / ("x" * 240))))[1]
    assert new_file(str(tmp_path / "new" / "file")) == tmp_path / "new" / "file"
    assert found(tmp_path) == {"folder": {"mine": b"1"}, "new": {}}


def test_an_error_without_a_name_gets_that_of_the_file_it_was_for(tmp_path, capsys):
    def main():
        with written_whole(tmp_path / "run.json"):
            pathlib.Path("/dev/full").write_text("x")

    where = f"No space left on device: {tmp_path}/run.json"
    advice = "free some space or choose another folder"
    assert ending(capsys, main) == (2, f"error: {where}; {advice}\n")
    assert found(tmp_path) == {}


def test_folders_above_are_made(tmp_path):
    with written_whole(str(tmp_path / "a" / "b" / "file")) as beside:
        beside.write_bytes(b"1")
    assert found(tmp_path) == {"a": {"b": {"file": b"1"}}}


def test_everything_is_on_the_disk_before_it_bears_its_name(tmp_path, monkeypatch):
    synced = []

    def note(fd):
        synced.append((os.fstat(fd).st_ino, (tmp_path / "run").exists()))

    monkeypatch.setattr(files.os, "fsync", note)
    with written_whole(tmp_path / "run") as beside:
        put(beside, {"a": b"1", "deeper": {"b": b"2"}})
    written = [tmp_path / "run" / "a", tmp_path / "run" / "deeper" / "b"]
    assert sorted(synced) == sorted((file.stat().st_ino, False) for file in written)


def test_what_an_earlier_crash_left_under_the_same_name_is_replaced(tmp_path):
    put(tmp_path / f".out.{os.getpid()}.unfinished", {"stale": b"1"})
    with written_whole(tmp_path / "out") as beside:
        assert not beside.exists()
        put(beside, b"new")
    assert found(tmp_path) == {"out": b"new"}


@pytest.mark.parametrize("folder", [True, False])
def test_what_a_link_points_to_is_replaced_and_the_link_stays(tmp_path, folder):
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "target", tmp_path / "link"
    for text in ("old", "new"):
        with written_whole(link if text == "new" else target) as beside:
            if folder:
                beside.mkdir()
            (beside / "file" if folder else beside).write_text(text)
        if text == "old":
            link.symlink_to(target)
    assert link.is_symlink() and (target / "file" if folder else target).read_text() == "new"
    names = sorted(f.name for f in tmp_path.rglob("*") if f.name != "file")
    assert names == ["disk", "link", "target"]


def test_the_folder_one_is_in_can_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with written_whole(".") as beside:
        beside.mkdir()
        (beside / "file").write_text("new")
    assert (tmp_path / "file").read_text() == "new"


def test_a_folder_that_takes_no_file_is_refused_before_the_work(capsys):
    assert ending(capsys, lambda: new_file("/proc/file"))[0] == 2


def test_what_is_written_can_be_read_by_those_whom_the_umask_allows(tmp_path):
    before = os.umask(0o027)
    try:
        with written_whole(tmp_path / "folder") as folder:
            folder.mkdir()
            save_file({"a": torch.ones(1)}, folder / "a.safetensors")  # its library writes 0600
    finally:
        os.umask(before)
    assert (tmp_path / "folder" / "a.safetensors").stat().st_mode & 0o777 == 0o640


def test_only_a_name_of_our_own_is_a_leftover(tmp_path):
    for name in (".base.12.unfinished", ".step-1.7.old"):
        assert files.is_leftover(tmp_path / name)
    for name in (".env.old", "base.12.old", ".base.old", ".base.x.old", ".base.12.old.bak"):
        assert not files.is_leftover(tmp_path / name)
