"""A small Hugging Face on this machine: a server that speaks as much of the hub's protocol as its
client needs, keeps a record of what it was asked, and can fail in the ways that the real one does.
"""

import contextlib
import hashlib
import http.server
import json
import re
import threading
import time
import urllib.parse
from typing import NamedTuple

API = re.compile(r"/api/(model|dataset)s/([^/]+/[^/]+)")
FILE = re.compile(r"/(datasets/)?([^/]+/[^/]+)/resolve/(\w+)/(.+)")
LARGE = (".safetensors", ".bin", ".gguf")  # kept by Git LFS, which names a file by its SHA-256


class Asked(NamedTuple):
    """One request."""

    method: str
    path: str
    range: str | None


class Hub:
    """Repositories {("model", "org/name"): {file: bytes}}, faults, and what was asked.

    refused: {"org/name": (status, X-Error-Code)}, for every request about it
    withheld: the same, only for its files, which everybody may list
    lost: {file}: listed, but not there
    broken: {file: (bytes, times)}: sends so many bytes and hangs up, so many times
    claimed: {file: bytes}: its size as it is announced
    delay: seconds before a file is sent
    newer: what replaces repositories once a file is asked for
    """

    def __init__(self, repositories):
        self.repositories = repositories
        self.refused, self.withheld, self.lost = {}, {}, set()
        self.broken, self.claimed = {}, {}
        self.delay = 0
        self.newer = {}
        self.asked = []

    def sent(self):
        """The names of the files that were asked for by GET, sorted; one asked for twice, twice."""
        found = [FILE.fullmatch(a.path) for a in self.asked if a.method == "GET"]
        return sorted(match[4] for match in found if match)


@contextlib.contextmanager
def serving(hub):
    """Serves a Hub on a free port of this machine; hub.url is its address."""
    handler = type("Handler", (Answers,), {"hub": hub})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def commit(files):
    """The name of a version: 40 hexadecimal digits."""
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


def entry(name, content, size):
    """A file as the API lists it."""
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    found = {"rfilename": name, "size": size, "blobId": blob}
    if name.endswith(LARGE):
        sha = hashlib.sha256(content).hexdigest()
        found["lfs"] = {"sha256": sha, "size": size, "pointerSize": 134}
    return found


class Answers(http.server.BaseHTTPRequestHandler):
    """Answers the requests of huggingface_hub. HTTP/1.0: a connection ends with its answer."""

    hub: Hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        path = urllib.parse.unquote(self.path.partition("?")[0])
        asked = Asked(self.command, path, self.headers.get("Range"))
        if match := API.fullmatch(path):
            self.hub.asked.append(asked)
            self.describe(match[1], match[2])
        elif match := FILE.fullmatch(path):
            self.hub.asked.append(asked)
            self.send_file("dataset" if match[1] else "model", match[2], match[4])
        else:  # the client may have questions of its own, such as who asks
            self.refuse(404, "")

    def refuse(self, status, code):
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def files_of(self, kind, name):
        """The files of a repository; None, once the refusal is sent, where it is refused."""
        if name in self.hub.refused:
            return self.refuse(*self.hub.refused[name])
        files = self.hub.repositories.get((kind, name))
        return self.refuse(401, "RepoNotFound") if files is None else files

    def describe(self, kind, name):
        files = self.files_of(kind, name)
        if files is None:
            return
        listed = []
        for file, content in files.items():
            listed.append(entry(file, content, self.hub.claimed.get(file, len(content))))
        answer = {"id": name, "sha": commit(files), "siblings": listed}
        answer |= {"private": False, "downloads": 0, "likes": 0, "tags": []}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def send_file(self, kind, name, file):
        self.hub.repositories |= self.hub.newer
        files = self.files_of(kind, name)
        if files is None:
            return
        if name in self.hub.withheld:
            return self.refuse(*self.hub.withheld[name])
        if file not in files or file in self.hub.lost:
            return self.refuse(404, "EntryNotFound")
        content = files[file]
        size = self.hub.claimed.get(file, len(content))
        listed = entry(file, content, size)
        etag = listed["lfs"]["sha256"] if "lfs" in listed else listed["blobId"]
        asked_range = self.headers.get("Range")
        start = int(asked_range.removeprefix("bytes=").partition("-")[0]) if asked_range else 0
        self.send_response(206 if asked_range else 200)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", commit(files))
        if "lfs" in listed:
            self.send_header("X-Linked-Etag", f'"{etag}"')
            self.send_header("X-Linked-Size", str(size))
        if asked_range:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "GET":
            self.send_body(file, content, start)

    def send_body(self, file, content, start):
        time.sleep(self.hub.delay)
        end, times = self.hub.broken.get(file, (len(content), 0))
        if times:
            self.hub.broken[file] = end, times - 1
        else:
            end = len(content)
        self.wfile.write(content[start:end])
