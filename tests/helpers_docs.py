"""The commands in the fenced blocks of README.md and docs/, and how they are run."""

import re
import runpy
import shlex

from helpers_runs import ROOT

BLOCK = re.compile(r"^```(\w+) ?([\w. -]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page, language, mark):
    """The texts of a page's fenced blocks of one language with one mark."""
    found = BLOCK.findall(page.read_text())
    return [text for name, note, text in found if (name, note) == (language, mark)]


def commands(page, mark):
    """The words of every command in a page's shell blocks, without comments and `pip install`."""
    found = []
    for text in blocks(page, "sh", mark):
        for line in text.splitlines():
            command = line.partition("#")[0].rpartition("&&")[2].strip()
            if command:
                found.append(shlex.split(command))
    return found


def run_here(words, monkeypatch):
    """Runs `python SCRIPT OPTIONS` in this process."""
    assert words[0] == "python", words
    monkeypatch.setattr("sys.argv", words[1:])
    try:
        runpy.run_path(str(ROOT / words[1]), run_name="__main__")
    except SystemExit as e:
        assert not e.code, words
