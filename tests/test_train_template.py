"""The format of a run: chosen once, trained in, and found wherever the run is used."""

import json
import shutil

import jinja2
import pytest
from helpers_docs import run_here
from helpers_gguf import FromFile
from helpers_runs import RECORDS, options, run

import formats
from text.batches import encode, encode_asking
from text.instructions import Turn
from text.templates import alpaca_prompt, alpaca_template
from text.tokenizer import CHAT_TEMPLATE

ASKED = Turn("user", "Say how many letters town has.")
OWN = (
    "{% for m in messages %}{{ bos_token + m.role + ': ' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ bos_token + 'assistant:' }}{% endif %}"
)
OTHER = OWN.replace(": ", ":  ").replace("'assistant:'", "'assistant: '")
QUICK = dict(steps=1, save_every=1)


@pytest.fixture(scope="module")
def chat(world, tmp_path_factory):
    """A world like `world`, whose weights have a chat template; and two files of templates."""
    folder = tmp_path_factory.mktemp("chat")
    shutil.copytree(world / "weights", folder / "weights")
    (folder / "weights" / CHAT_TEMPLATE).write_text(OWN)
    (folder / "other.jinja").write_text(OTHER)
    (folder / "records.json").write_text(json.dumps(RECORDS))
    (folder / "texts.jsonl").write_text('{"text": "Once upon a time."}\n' * 40)
    return folder


def template_of(run):
    return json.loads((run / "adapter" / "adapter.json").read_text())["template"]


@pytest.fixture(scope="module")
def runs(chat, world):
    """{which: (the run's folder, what it printed)}."""
    found = {}
    for which, changed in {
        "own": {},
        "alpaca": {"template": "alpaca"},
        "other": {"template": chat / "other.jinja"},
        "text": {"data": chat / "texts.jsonl"},
        "base": {"weights": world / "weights"},
    }.items():
        words = options(chat, chat / which, **QUICK, **changed)
        found[which] = chat / which, run(chat / f"{which}.log", words)
    return found


def test_a_model_is_tuned_in_its_own_format_a_base_model_in_alpacas_or_as_template_says(runs):
    found = {which: template_of(folder) for which, (folder, _) in runs.items()}
    alpaca = alpaca_template(True)
    expected = {"own": OWN, "alpaca": alpaca, "other": OTHER, "text": None, "base": alpaca}
    assert found == expected
    said = {which: "Alpaca, as" in printed for which, (_, printed) in runs.items()}
    assert said == {"own": False, "alpaca": True, "other": False, "text": False, "base": True}
    assert "format:" not in runs["text"][1]


def test_the_examples_are_in_the_format_of_the_run(runs, chat):
    """A loss of examples in another format would be another."""
    losses = {}
    for which, (folder, _) in runs.items():
        losses[which] = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    assert losses["alpaca"] == losses["base"] and len(set(losses.values())) == 4, losses


@pytest.mark.parametrize("which", ["own", "alpaca", "other", "base"])
def test_a_run_and_what_is_merged_or_exported_from_it_ask_as_it_was_trained(
    runs, tmp_path, monkeypatch, which
):
    folder, _ = runs[which]
    tokenizer = formats.load_tokenizer(folder)
    assert tokenizer.chat_template == template_of(folder)
    prompts = {
        "own": f"<s>user: {ASKED.text}</s><s>assistant:",
        "other": f"<s>user:  {ASKED.text}</s><s>assistant: ",
    }
    expected = prompts.get(which, f"<s>{alpaca_prompt(ASKED.text)}")
    (example,), _ = encode([(ASKED, Turn("assistant", "4"))], tokenizer, 1000)
    asked = encode_asking([ASKED], tokenizer)
    assert example.tokens[~example.learned].tolist() == asked
    run_here(["python", "merge.py", str(folder), "--out", str(tmp_path / "merged")], monkeypatch)
    assert (tmp_path / "merged" / CHAT_TEMPLATE).read_text() == template_of(folder)
    assert encode_asking([ASKED], formats.load_tokenizer(tmp_path / "merged")) == asked
    file = str(tmp_path / "model.gguf")
    run_here(["python", "export.py", str(folder), "--out", file], monkeypatch)
    metadata = FromFile(file).metadata
    client = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    client = client.from_string(metadata["tokenizer.chat_template"])
    messages = [{"role": "user", "content": ASKED.text}]
    names = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
    assert client.render(messages=messages, **names) == expected
    assert encode_asking([ASKED], formats.load_tokenizer(file)) == asked


def test_a_template_for_plain_text_is_refused(chat, tmp_path):
    words = options(chat, tmp_path / "run", data=chat / "texts.jsonl", template="alpaca", **QUICK)
    assert "--template is for conversations" in run(tmp_path / "log", words, status=2)


def test_a_run_goes_on_in_its_own_format_only(runs, chat, tmp_path):
    folder = shutil.copytree(runs["other"][0], tmp_path / "run")
    more = ["--resume", "--out", str(folder), "--steps", "2"]
    refused = run(tmp_path / "log", [*more, "--template", "alpaca"], status=2)
    assert "examples" in refused
    run(tmp_path / "log", more)
    assert template_of(folder) == OTHER
    content = (chat / "other.jinja").read_text()
    try:
        (chat / "other.jinja").write_text(content.replace(": ", ":   "))
        refused = run(tmp_path / "log", [*more[:-1], "3"], status=2)
    finally:
        (chat / "other.jinja").write_text(content)
    assert "examples" in refused


@pytest.mark.parametrize(
    "content, said",
    [
        (None, "it is neither alpaca nor a file"),
        (b"\xff", "line 1: byte 0xff is not UTF-8"),
        (b" \n", "leaves out the answer"),
        (b"{% for %}", "is not valid"),
        (b"{{ raise_exception('no system role, please') }}", "no system role, please"),
        (b"{{ messages }}", "otherwise once it has gone on"),
    ],
)
def test_a_template_that_does_not_work_ends_in_one_line_before_anything_is_quantized(
    chat, tmp_path, content, said
):
    if content is not None:
        (tmp_path / "bad.jinja").write_bytes(content)
    words = options(chat, tmp_path / "run", template=tmp_path / "bad.jinja", **QUICK)
    assert said in run(tmp_path / "log", words, status=2)
    assert not (tmp_path / "run" / "base").exists()
