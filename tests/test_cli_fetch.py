"""Weights and data are fetched by the real client, from a small hub that runs on this machine."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers_docs import run_here
from helpers_hub import Hub, serving
from helpers_runs import ENVIRONMENT, RECORDS, command

from cli.fetch import REPOSITORIES, is_repository
from formats.files import write_config
from llama import CONFIGS

# Calls cli.fetch as train.py does. torch takes seconds to import and has no part in this: a
# stand-in has the names that are wanted
DRIVER = """import sys
sys.modules["torch"] = sys.modules["safetensors"] = stand_in = type(sys)("stand_in")
stand_in.OutOfMemoryError = stand_in.SafetensorError = MemoryError
stand_in.dtype = object
from cli import fetch
from cli.errors import run_command
function, name, before = sys.argv[1:]
exec(before)
run_command(lambda: print("found:", getattr(fetch, function)(name)))
"""
WEIGHTS = {
    "config.json": b"{}",
    "generation_config.json": b'{"eos_token_id": 2}',
    "tokenizer.json": b"[]",
    "model.safetensors": os.urandom(50_000),
}
OTHERS = {
    "README.md": b"# tiny",
    "consolidated.safetensors": b"?",
    "optimizer.pt": b"?",
    "original/model.safetensors": b"?",
    "pytorch_model.bin": b"?",
    "rng_state.safetensors": b"?",
}
DATA = {"README.md": b"# data", "records.json": json.dumps(RECORDS).encode()}
UNREACHABLE = "http://127.0.0.1:9"
HASTE = "import time; time.sleep = lambda _: None"  # the client waits longer from try to try


@pytest.fixture
def hub():
    repositories = {("model", "org/tiny"): {**WEIGHTS, **OTHERS}, ("dataset", "org/data"): DATA}
    with serving(Hub(repositories)) as hub:
        yield hub


# A shell's background job inherits that SIGINT is ignored
HEARS_CTRL_C = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)"


@pytest.fixture
def start(hub, tmp_path):
    """A function that starts the driver with a cache of its own."""

    def start(name, function="fetch_weights", before="", **environment):
        environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), **environment}
        return subprocess.Popen(
            [sys.executable, "-c", DRIVER, function, name, before],
            env={**ENVIRONMENT, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


@pytest.fixture
def fetch(start):
    """A function that runs the driver; returns (the path that was found, all that was printed)."""

    def fetch(*arguments, status=0, **more):
        return ending(start(*arguments, **more), status)

    return fetch


def ending(process, status=0):
    out, err = process.communicate(timeout=100)
    assert process.returncode == status and "Traceback" not in err, (out, err)
    if status:
        last = err.splitlines()[-1]
        assert last.startswith("error: ") and err.count("error: ") == 1, err
        return None, last
    *lines, found = out.splitlines()
    return pathlib.Path(found.removeprefix("found: ")), "\n".join(lines)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---- what is fetched


def test_only_the_files_that_are_needed_are_fetched(hub, fetch):
    folder, _ = fetch("org/tiny")
    assert contents(folder) == WEIGHTS
    assert hub.sent() == sorted(WEIGHTS)


def test_of_weights_in_parts_the_index_and_every_part_are_fetched(hub, fetch):
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    files = {"config.json": b"{}", "model.safetensors.index.json": index.encode()}
    files |= {"model-1.safetensors": b"1", "model-2.safetensors": b"22"}
    hub.repositories["model", "org/tiny"] = {**files, **OTHERS, "models/3.safetensors": b"?"}
    folder, text = fetch("org/tiny")
    assert contents(folder) == files
    assert "4 files" in text


def test_pickles_are_fetched_where_there_are_no_safetensors(hub, fetch):
    files = {"config.json": b"{}", "tokenizer.model": b"t", "pytorch_model.bin": b"w"}
    hub.repositories["model", "org/tiny"] = {**files, "tf_model.h5": b"?"}
    folder, _ = fetch("org/tiny")
    assert contents(folder) == files


@pytest.mark.parametrize("parts", [["x.safetensors"], ["1.safetensors", "2.safetensors"]])
def test_a_gptq_repository_may_name_its_files_as_it_likes(hub, fetch, parts):
    files = {"config.json": b"{}", "quantize_config.json": b"{}"} | dict.fromkeys(parts, b"w")
    if len(parts) > 1:
        files["gptq_model-4bit-128g.safetensors.index.json"] = b"{}"
    hub.repositories["model", "org/tiny"] = {**files, "README.md": b"?", "x/y.safetensors": b"?"}
    folder, _ = fetch("org/tiny")
    assert contents(folder) == files
    del hub.repositories["model", "org/tiny"]["quantize_config.json"]
    _, message = fetch("org/tiny", status=2)
    assert "has no config.json with model.safetensors" in message


def test_one_gguf_file_is_fetched_by_its_name(hub, fetch):
    hub.repositories["model", "org/gguf"] = {"a.Q4_1.gguf": b"a", "b/c.gguf": b"c"}
    file, text = fetch("org/gguf:b/c.gguf")
    assert file.read_bytes() == b"c" and file.name == "c.gguf"
    assert "org/gguf:b/c.gguf, 1 file, 1 bytes" in text
    _, message = fetch("org/gguf", status=2)
    assert "a.Q4_1.gguf, b/c.gguf" in message and "--weights org/gguf:FILE" in message
    _, message = fetch("org/tiny:model.safetensors", status=2)
    assert "leave out :model.safetensors" in message


def test_the_file_of_a_data_set_is_fetched_by_name_or_as_the_only_one(hub, fetch):
    hub.repositories["dataset", "org/data"]["dataset_infos.json"] = b"{}"
    for name in ("org/data", "org/data:records.json"):
        file, _ = fetch(name, "fetch_data")
        assert json.loads(file.read_bytes()) == RECORDS
    assert hub.sent() == ["records.json"]


def test_of_a_data_set_with_several_files_one_must_be_named(hub, fetch):
    hub.repositories["dataset", "org/many"] = {f"{i}.jsonl": b"" for i in range(10)}
    _, message = fetch("org/many", "fetch_data", status=2)
    assert "--data org/many:FILE" in message
    assert "0.jsonl" in message and "7.jsonl and 2 more" in message


# ---- what is printed, and the cache


def test_it_says_what_is_fetched_how_large_it_is_and_where_it_goes(hub, fetch, tmp_path):
    _, text = fetch("org/tiny")
    place = f"into {tmp_path}/hub ({hub.url})"
    assert text == f"weights: fetching org/tiny, 4 files, 50.02 KB, {place}"


def test_a_second_call_fetches_nothing(hub, fetch):
    folder, _ = fetch("org/tiny")
    hub.asked.clear()
    again, text = fetch("org/tiny")
    assert again == folder and text == f"weights: org/tiny is in {folder}"
    assert [asked.path for asked in hub.asked] == ["/api/models/org/tiny"]


def test_of_a_new_version_only_what_has_changed_is_fetched(hub, fetch):
    fetch("org/tiny")
    hub.asked.clear()
    hub.repositories["model", "org/tiny"]["config.json"] = b'{"new": 1}'
    folder, text = fetch("org/tiny")
    assert contents(folder) == {**WEIGHTS, "config.json": b'{"new": 1}'}
    assert "1 of 4 files, 10 bytes" in text and hub.sent() == ["config.json"]


@pytest.mark.parametrize("offline", [{"HF_ENDPOINT": UNREACHABLE}, {"HF_HUB_OFFLINE": "1"}])
def test_without_a_network_what_was_fetched_before_is_used(hub, fetch, offline):
    folder, _ = fetch("org/tiny")
    file, _ = fetch("org/data", "fetch_data")
    again, text = fetch("org/tiny", **offline)
    assert again == folder and f"org/tiny as fetched before is in {folder}" in text
    assert "cannot be reached" in text or "forbids the network" in text
    assert fetch("org/data", "fetch_data", **offline)[0] == file


def test_without_a_network_half_of_the_weights_is_not_enough(hub, fetch):
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    files = {"config.json": b"{}", "model.safetensors.index.json": index.encode()}
    files |= {"model-1.safetensors": b"1", "model-2.safetensors": b"22"}
    hub.repositories["model", "org/tiny"] = files
    folder, _ = fetch("org/tiny")
    for name in ("model-2.safetensors", "config.json"):
        (folder / name).unlink()
        _, message = fetch("org/tiny", status=2, HF_ENDPOINT=UNREACHABLE)
        assert "cannot be reached" in message


def test_two_at_once_both_find_whole_files(hub, start):
    hub.delay = 0.5
    first, second = [start("org/tiny") for _ in range(2)]
    folders = {ending(first)[0], ending(second)[0]}
    assert len(folders) == 1 and contents(folders.pop()) == WEIGHTS
    assert hub.sent() == sorted(WEIGHTS), "one waits for the other"


def test_of_processes_that_train_together_only_the_first_prints(start, tmp_path):
    bars = {"TQDM_POSITION": "-1"}  # shows them though this is no terminal
    second = start("org/tiny", RANK="1", **bars)
    out, err = second.communicate()
    assert out.startswith("found: ") and not err
    shutil.rmtree(tmp_path / "hub")
    out, err = start("org/tiny", RANK="0", **bars).communicate()
    assert out.startswith("weights: fetching org/tiny") and "model.safetensors" in err


# ---- what goes wrong


@pytest.mark.parametrize(
    "environment, why",
    [
        ({"HF_ENDPOINT": UNREACHABLE}, f"{UNREACHABLE} cannot be reached ("),
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE forbids the network"),
    ],
)
def test_without_a_network_it_says_what_to_do(fetch, environment, why):
    _, message = fetch("org/tiny", status=2, **environment)
    assert why in message and "put the files into a folder and name it by --weights" in message
    _, message = fetch("org/data", "fetch_data", status=2, **environment)
    assert why in message and "name a file of your own by --data" in message


def test_without_the_package_it_says_how_to_get_it(fetch):
    before = "sys.modules['huggingface_hub'] = None"
    _, message = fetch("org/tiny", before=before, status=2)
    assert "pip install huggingface_hub" in message


def test_a_download_that_breaks_off_goes_on_where_it_was(hub, start, fetch):
    hub.broken["model.safetensors"] = 20_000, 1
    before = "from huggingface_hub import constants; constants.DOWNLOAD_CHUNK_SIZE = 1000"
    start("org/tiny", before=before).communicate()  # goes on itself, from version 1.18 on
    folder, _ = fetch("org/tiny")
    assert contents(folder) == WEIGHTS
    assert [a.range for a in hub.asked if a.range] == ["bytes=20000-"]


def test_ctrl_c_stops_a_download_at_once_and_leaves_nothing_half_in_its_place(hub, start, tmp_path):
    hub.delay = 200
    process = start("org/tiny", before=HEARS_CTRL_C)
    while not hub.sent():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=100)
    assert process.returncode == 130 and text.endswith("stopped\n")
    assert not list(tmp_path.glob("hub/*/snapshots/*/*"))


def test_a_download_that_keeps_breaking_off_is_taken_up_by_the_next_call(hub, fetch):
    hub.broken["model.safetensors"] = 20_000, 10**6
    _, message = fetch("org/tiny", before=HASTE, status=2)
    assert "the download of org/tiny failed" in message and "run the same command again" in message
    hub.broken.clear()
    hub.asked.clear()
    folder, text = fetch("org/tiny")
    assert contents(folder) == WEIGHTS
    assert "1 of 4 files" in text and hub.sent() == ["model.safetensors"]


def test_a_file_of_another_size_than_announced_is_refused(hub, fetch):
    hub.claimed["model.safetensors"] = 60_000
    _, message = fetch("org/tiny", status=2)
    assert "should be of size 60000" in message and "run the same command again" in message


@pytest.mark.parametrize("refused", [(401, "RepoNotFound"), (404, "RepoNotFound")])
def test_what_is_not_there_or_private_is_said_to_be(hub, fetch, refused):
    hub.refused["org/tiny"] = refused
    _, message = fetch("org/tiny", status=2)
    assert f"on {hub.url} there is no model org/tiny, or it is private" in message
    assert "hf auth login" in message


@pytest.mark.parametrize("status", [401, 403])
def test_what_is_gated_says_where_to_accept_the_licence(hub, fetch, status):
    hub.refused["org/tiny"] = hub.refused["org/data"] = status, "GatedRepo"
    _, message = fetch("org/tiny", status=2)
    assert f"org/tiny is gated: accept its licence on {hub.url}/org/tiny, then" in message
    _, message = fetch("org/data", "fetch_data", status=2)
    assert f"licence on {hub.url}/datasets/org/data, then log in with `hf auth login`" in message


def test_files_that_are_gated_though_they_may_be_listed_say_the_same(hub, fetch):
    hub.withheld["org/tiny"] = 403, "GatedRepo"
    assert "org/tiny is gated" in fetch("org/tiny", status=2)[1]


def test_a_token_that_is_refused_asks_to_log_in(hub, fetch):
    hub.refused["org/tiny"] = 403, ""
    assert "log in: hf auth login" in fetch("org/tiny", status=2)[1]


def test_an_error_of_the_server_asks_to_try_later(hub, fetch):
    hub.refused["org/tiny"] = 503, ""
    _, message = fetch("org/tiny", status=2)
    assert f"{hub.url} answers with error 503" in message and "later, or put" in message
    hub.refused.clear()
    hub.withheld["org/tiny"] = 500, ""
    _, message = fetch("org/tiny", before=HASTE, status=2)
    assert f"{hub.url} answers with error 500" in message
    hub.withheld.clear()
    folder, _ = fetch("org/tiny")
    hub.refused["org/tiny"] = 503, ""
    assert fetch("org/tiny")[0] == folder


def test_a_version_that_comes_in_the_middle_asks_to_start_again(hub, fetch):
    hub.newer["model", "org/tiny"] = {**WEIGHTS, "config.json": b"{'new': 1}"}
    assert "org/tiny has just changed" in fetch("org/tiny", status=2)[1]
    assert contents(fetch("org/tiny")[0])["config.json"] == b"{'new': 1}"


def test_a_file_that_is_not_listed_is_refused_with_those_that_are(hub, fetch):
    _, message = fetch("org/data:train.json", "fetch_data", status=2)
    assert "org/data has no file train.json; it has README.md, records.json" in message


def test_a_file_that_is_listed_but_not_there_is_one_line(hub, fetch):
    hub.lost.add("tokenizer.json")
    assert "does not have all of org/tiny" in fetch("org/tiny", status=2)[1]


@pytest.mark.parametrize("kind, function", [("model", "fetch_weights"), ("dataset", "fetch_data")])
def test_a_repository_with_nothing_of_use_says_what_it_has(hub, fetch, kind, function):
    hub.repositories[kind, "org/other"] = {"README.md": b"", "flax_model.msgpack": b""}
    _, message = fetch("org/other", function, status=2)
    assert "it has README.md, flax_model.msgpack" in message


def test_too_little_room_is_found_before_anything_is_fetched(hub, fetch, tmp_path):
    before = "import shutil; shutil.disk_usage = lambda p: shutil._ntuple_diskusage(9, 0, 40_000)"
    _, message = fetch("org/tiny", before=before, status=2)
    assert f"{tmp_path}/hub has 40.00 KB free where org/tiny needs 50.02 KB" in message
    assert "HF_HOME" in message and not hub.sent()


def test_a_disk_that_is_full_in_the_middle_is_one_line(fetch):
    before = """def write(*_, **__):
    raise OSError(122, "Disk quota exceeded")
import huggingface_hub.file_download as client
client.http_get = write"""
    _, message = fetch("org/tiny", before=before, status=2)
    assert "is full; free some space" in message and "HF_HOME" in message


def test_a_cache_that_cannot_be_written_is_one_line(fetch, tmp_path):
    (tmp_path / "file").write_text("")
    _, message = fetch("org/tiny", status=2, HF_HOME=str(tmp_path / "file"))
    assert f"{tmp_path}/file" in message and "cannot be written" in message


def test_a_page_that_is_no_answer_of_hugging_face_is_one_line(hub, fetch):
    hub.refused["org/tiny"] = 200, ""  # as a hotel's page for its guests
    _, message = fetch("org/tiny", status=2)
    assert "does not answer as Hugging Face does" in message


# ---- names


@pytest.mark.parametrize(
    "name", ["org/name", "o.r-g/na_me-2.5b", "org/name:file.gguf", "a/b:c/d.json"]
)
def test_these_name_a_repository(name):
    assert is_repository(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "name",
        "a/b/c",
        "../x/y",
        "./x",
        "/x/y",
        "x/",
        "/x",
        "a/b:",
        "a/b:c:d",
        "a b/c",
        "a/..",
        "a--b/c",
    ],
)
def test_these_do_not(name):
    assert not is_repository(name)


@pytest.mark.parametrize("name", ["data/alpaca.json", "models/x.Q4_1.GGUF", "a/b.jsonl.gz"])
def test_what_ends_like_a_file_is_a_path_that_is_wrong(name):
    assert not is_repository(name)


def test_a_file_or_folder_of_that_name_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("org/name").mkdir(parents=True)
    pathlib.Path("org/data:x").write_text("")
    assert not is_repository("org/name") and not is_repository("org/data:x")


def test_every_size_but_the_tiny_one_has_a_repository():
    assert [*REPOSITORIES] == [name for name in CONFIGS if name != "tiny"]
    assert all(is_repository(name) for name in REPOSITORIES.values())


# ---- whole runs


FEW = ["--quantizer", "rtn", "--steps", "2", "--rank", "2", "--max-length", "96"]
FEW += ["--batch-size", "4", "--micro-batch-size", "2"]


def test_a_run_from_nothing_fetches_trains_and_merges(hub, world, tmp_path, monkeypatch):
    files = {path.name: path.read_bytes() for path in (world / "weights").iterdir()}
    hub.repositories["model", "org/tiny"] = {**files, **OTHERS}
    place = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache")}
    words = ["--weights", "org/tiny", "--data", "org/data", *FEW]
    text, _ = command("train.py", *words, cwd=tmp_path, environment=place)
    assert text.index("data: fetching org/data,") < text.index("weights: fetching org/tiny,")
    assert hub.sent() == sorted([*files, "records.json"])
    run = tmp_path / "runs" / "tiny"
    kept = json.loads((run / "run.json").read_text())
    snapshots = tmp_path / "cache" / "hub" / "models--org--tiny" / "snapshots"
    assert pathlib.Path(kept["weights"]).parent == snapshots and (run / "adapter").exists()
    hub.asked.clear()
    run_here(["python", "merge.py", str(run), "--out", str(tmp_path / "merged")], monkeypatch)
    assert (tmp_path / "merged" / "config.json").exists()
    assert not hub.asked


@pytest.mark.parametrize(
    "words, said",
    [
        (["--data", "bad.jsonl"], "bad.jsonl, line 1 (record 1): its fields"),
        (["--data", "org/nowhere"], "there is no dataset org/nowhere"),
        (["--data", "good.jsonl", "--template", "bad.jinja"], "is not valid"),
        (["--data", "good.jsonl", "--model", "7b", "--group-size", "48"], "group size 48 does not"),
    ],
)
def test_what_is_wrong_is_found_before_weights_are_fetched(hub, tmp_path, words, said):
    (tmp_path / "bad.jsonl").write_text("{}")
    (tmp_path / "good.jsonl").write_text(json.dumps(RECORDS[0]))
    (tmp_path / "bad.jinja").write_text("{% for %}")
    place = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache")}
    words = ["train.py", "--weights", "org/tiny", *words]
    _, error = command(*words, status=2, cwd=tmp_path, environment=place)
    assert said in error and error.count("\n") == 1, error
    assert not hub.sent()


def test_a_size_alone_fetches_its_weights_and_alpaca(hub, world, tmp_path):
    write_config(CONFIGS["smollm2-135m"], tmp_path)
    files = {"config.json": (tmp_path / "config.json").read_bytes(), "model.safetensors": b"?"}
    files["tokenizer.model"] = (world / "weights" / "tokenizer.model").read_bytes()
    alpaca = {"alpaca_data_cleaned.json": DATA["records.json"], "other.json": b"[]"}
    hub.repositories["model", "HuggingFaceTB/SmolLM2-135M"] = files
    hub.repositories["dataset", "yahma/alpaca-cleaned"] = alpaca
    place = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache")}
    words = ["--model", "smollm2-135m"]
    text, error = command("train.py", *words, cwd=tmp_path, environment=place, status=2)
    assert "weights: fetching HuggingFaceTB/SmolLM2-135M, 3 files" in text
    assert f"data: {len(RECORDS)} records in Alpaca form" in text
    assert "model.safetensors: not a file of weights" in error.splitlines()[-1]
    assert hub.sent() == sorted([*files, "alpaca_data_cleaned.json"])
