"""Text in, batches of tokens out: the tokenizer, instruction files in the forms people have, a toy world to learn.

One idea serves every kind of text: a `Record` is a prompt and the response to be learned. Instructions become prompts
in Alpaca's template, plain text has an empty prompt. Prompt and response are tokenized apart and joined, so a
response's tokens are the same whatever was asked. LLaMA's tokenizer puts a space before any text it is given: the
model reads `### Response: Oslo.`, and continues `### Response:` with that space. Files are read whole, which lets one
reader serve all forms (52,000 Alpaca records are 23 MB).

    python -m pytest tests/test_data.py
"""

import collections
import functools
import io
import itertools
import json
import math
import pathlib
import random
import re

import numpy as np
import sentencepiece
import torch

from cli import UserError, written_whole

Record = collections.namedtuple("Record", "prompt response")
Example = collections.namedtuple("Example", "tokens prompt_length")
Question = collections.namedtuple("Question", "prompt choices answer")
World = collections.namedtuple("World", "documents train test choices heldout")


# --- the tokenizer

def load_tokenizer(path):
    """Reads a sentencepiece model: the file itself, or tokenizer.model in a model's folder or a run's base/.

    UserError where there is none, or none that marks where a text begins and ends.
    """
    path = pathlib.Path(path)
    candidates = [path / "tokenizer.model", path / "base" / "tokenizer.model"] if path.is_dir() else [path]
    file = next((c for c in candidates if c.is_file()), None)
    if file is None:
        raise UserError(f"no tokenizer: {candidates[0]} does not exist; copy the model's tokenizer.model there")
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(file))
    except RuntimeError:
        raise UserError(f"{file} is not a sentencepiece model or is damaged; "
                        "copy the model's tokenizer.model again") from None
    if min(tokenizer.bos_id(), tokenizer.eos_id()) < 0:
        raise UserError(f"{file} has no BOS or no EOS piece; use the tokenizer.model that belongs to the model")
    return tokenizer


def decode(tokenizer, tokens):
    """The text of tokens. Those above the tokenizer's pieces have none: an embedding may be padded to a round number."""
    return tokenizer.decode([token for token in tokens if token < tokenizer.vocab_size()])


def train_tokenizer(texts, path, vocab_size):
    """Trains a BPE tokenizer on `texts`, writes it to the file `path` and returns it loaded.

    Like LLaMA's: unk 0, BOS 1, EOS 2, then 256 bytes, so that every text survives encode and decode exactly (but for
    one character, U+2581, which is how sentencepiece writes a space). Line breaks are bytes: no piece crosses one.
    The same texts give the same file. UserError where they cannot fill `vocab_size`, or do not fit in.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in text.split("\n")), model_writer=model,
            model_type="bpe", vocab_size=vocab_size, byte_fallback=True, normalization_rule_name="identity",
            remove_extra_whitespaces=False, max_sentence_length=2**30, num_threads=1, minloglevel=2)
    except RuntimeError as e:
        reason = str(e).split("] ")[-1] or "it is empty"
        raise UserError(f"no tokenizer of {vocab_size} pieces can be trained on this text: {reason}") from None
    with written_whole(path) as unfinished:
        unfinished.write_bytes(model.getvalue())
    return load_tokenizer(path)


# --- instruction files

REQUEST = "Write a response that appropriately completes the request."
PREAMBLE = f"Below is an instruction that describes a task. {REQUEST}"
PREAMBLE_WITH_INPUT = ("Below is an instruction that describes a task, paired with an input that provides further "
                       f"context. {REQUEST}")
FORMS = {  # the fields that a form needs; the first form whose fields a record has is the record's
    "Alpaca": ("instruction", "output"),  # and perhaps input
    "FLAN v2": ("inputs", "targets"),
    "Self-instruct": ("prompt", "completion"),  # Chip2 too
    "LongForm": ("input", "output"),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "text": ("text",),
}
ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


def alpaca_prompt(instruction, input=""):
    """Stanford Alpaca's published template, with or without input, up to and including `### Response:`."""
    if input:
        return f"{PREAMBLE_WITH_INPUT}\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
    return f"{PREAMBLE}\n\n### Instruction:\n{instruction}\n\n### Response:"


def read_records(path):
    """Reads a JSON list, JSON lines or a .txt file (a record a paragraph) -> (records, their form in FORMS).

    The first record's fields decide the form of the file. UserError names file and line of the first bad record.
    """
    text = read_text(path)
    if pathlib.Path(path).suffix.lower() == ".txt":
        records, form = [Record("", p) for p in re.split(r"\r?\n\s*\n", text.strip()) if p], "text"
    else:
        records, form = [], None
        for number, (line, value) in enumerate(_json_values(path, text), 1):
            try:
                form = _check_form(value, form)
                records += _records_of(value, form)
            except ValueError as e:
                raise UserError(f"{path}, line {line} (record {number}): {e}") from None
    if not records:
        raise UserError(f"{path} holds no records; give a JSON list, JSON lines or a .txt file")
    if not any(r.response.strip() for r in records):
        raise UserError(f"{path}: the responses of all {len(records)} records are empty; there is nothing to learn")
    return records, form


def read_text(path):
    """The whole of a UTF-8 file, without a byte order mark; UserError names the line of a byte that is not UTF-8."""
    try:
        return pathlib.Path(path).read_bytes().decode("utf-8-sig")
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except UnicodeDecodeError as e:
        line, byte = e.object.count(b"\n", 0, e.start) + 1, e.object[e.start]
        raise UserError(f"{path}, line {line}: byte {byte:#04x} is not UTF-8; save the file as UTF-8") from None


def _json_values(path, text):
    """[(line number, value)] for the items of one JSON list, or for JSON lines."""
    is_list = text.lstrip().startswith("[")
    try:
        if is_list:
            values = json.loads(text)
            return list(zip(_item_lines(text, len(values)), values))
        values = []
        for line, row in enumerate(text.split("\n"), 1):
            if row.strip():
                values.append((line, json.loads(row)))
        return values
    except (ValueError, RecursionError) as e:
        line = getattr(e, "lineno", 1) if is_list else line
        raise UserError(f"{path}, line {line}: not JSON ({getattr(e, 'msg', e)}); "
                        "expected a JSON list of records, or one record a line") from None


def _item_lines(text, count):
    """The line on which each of the `count` items of a valid JSON list begins."""
    decoder, separator = json.JSONDecoder(), re.compile(r"[\s,]*")
    line, last, end = 1, 0, text.index("[") + 1
    for _ in range(count):
        start = separator.match(text, end).end()
        line, last = line + text.count("\n", last, start), start
        yield line
        end = decoder.raw_decode(text, start)[1]


def _check_form(value, expected):
    """The form of one record; ValueError if it has none, or another than `expected` (None: nothing expected yet)."""
    if not isinstance(value, dict):
        raise ValueError(f"a record must be an object with named fields, not {type(value).__name__}")
    form = next((form for form, fields in FORMS.items() if all(field in value for field in fields)), None)
    if form is None:
        known = "; ".join(", ".join(fields) for fields in FORMS.values())
        found = ", ".join(list(value)[:8]) or "none"
        needed = f"{', '.join(FORMS[expected])}, as in the records before" if expected else f"one of {known}"
        raise ValueError(f"its fields ({found}) make no known form; needed: {needed}")
    if expected not in (None, form):
        raise ValueError(f"it has the form {form} ({', '.join(FORMS[form])}), the records before have the form "
                         f"{expected} ({', '.join(FORMS[expected])}); split the file by form")
    return form


def _records_of(value, form):
    if form in ("messages", "conversations"):
        return _conversation(value[form], *(("role", "content") if form == "messages" else ("from", "value")))
    if form == "text":
        return [Record("", _string(value, "text"))]
    ask, answer = FORMS[form]
    has_input = form == "Alpaca" and value.get("input") is not None
    prompt = alpaca_prompt(_string(value, ask), _string(value, "input") if has_input else "")
    return [Record(prompt, _string(value, answer))]


def _conversation(turns, role_field, text_field):
    """One Record for each of the assistant's turns, whose prompt is all that was said before it.

    So every answer is learned, at the price of reading a long conversation's beginning again for each. A system
    message takes the place of Alpaca's preamble, turns in a row by one speaker are one turn, and what the assistant
    says before it is asked anything is left out.
    """
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("a conversation must be a list of objects")
    said = [(_string(turn, role_field), _string(turn, text_field)) for turn in turns]
    unknown = next((role for role, _ in said if role not in ROLES), None)
    if unknown is not None:
        raise ValueError(f"unknown {role_field} {unknown!r}; known: {', '.join(ROLES)}")
    records, preamble, prompt = [], PREAMBLE, ""
    for role, group in itertools.groupby(said, lambda turn: ROLES[turn[0]]):
        text = "\n\n".join(text for _, text in group)
        if role == "system" and prompt:
            raise ValueError("a system message comes after a user's; it must come first")
        if role == "system":
            preamble = text
        elif role == "user":
            prompt = f"{prompt or preamble}\n\n### Instruction:\n{text}\n\n### Response:"
        elif prompt:
            records.append(Record(prompt, text))
            prompt += f" {text}"
    if not records:
        raise ValueError("no user's turn is followed by an assistant's; remove this conversation")
    return records


def _string(value, field):
    text = value.get(field)
    if not isinstance(text, str):
        raise ValueError(f"{field} is {type(text).__name__}, not a string" if field in value else f"no {field}")
    text.encode()  # JSON can write half a surrogate pair (\ud83d): a UnicodeEncodeError, which is a ValueError
    return text


# --- examples and batches

def encode(records, tokenizer, max_length):
    """Tokenizes records -> (list of Example, how many records were longer than `max_length` tokens).

    An Example's tokens are an int32 array: BOS, prompt, response, EOS. `prompt_length` counts those without loss: BOS
    and prompt. A longer record loses its end; where nothing of the response is left the record is dropped.
    """
    examples, truncated = [], 0
    for start in range(0, len(records), 4096):  # lists of Python's integers take ten times the room of an array
        chunk = records[start:start + 4096]
        prompts, responses = (tokenizer.encode([getattr(r, part) for r in chunk]) for part in Record._fields)
        for prompt, response in zip(prompts, responses):
            tokens = [tokenizer.bos_id(), *prompt, *response, tokenizer.eos_id()]
            truncated += len(tokens) > max_length
            if 1 + len(prompt) < max_length:
                examples.append(Example(np.array(tokens[:max_length], np.int32), 1 + len(prompt)))
    return examples, truncated


def batch_order(lengths, batch_size, step, seed):
    """The indices of the examples in step `step`'s batch: a pure function, so that a resumed run needs only the step.

    `lengths` is a sequence of numbers of tokens (a tuple is fastest). Examples of near-equal length share a batch. An
    epoch sees every example once; its last places are filled by drawing some a second time. Cheap: epochs are cached.
    """
    assert len(lengths) > 0 and batch_size > 0, (len(lengths), batch_size)
    per_epoch = -(-len(lengths) // batch_size)
    return _epoch(tuple(lengths), batch_size, step // per_epoch, seed)[step % per_epoch]


@functools.lru_cache(maxsize=2)
def _epoch(lengths, batch_size, epoch, seed):
    rng = random.Random(f"{seed} {epoch}")
    order = rng.sample(range(len(lengths)), len(lengths))
    order = list(itertools.islice(itertools.cycle(order), -(-len(order) // batch_size) * batch_size))
    batches = []
    for start in range(0, len(order), 64 * batch_size):  # sorting 64 batches is enough, and keeps most of the chance
        window = sorted(order[start:start + 64 * batch_size], key=lengths.__getitem__)
        batches += [window[i:i + batch_size] for i in range(0, len(window), batch_size)]
    rng.shuffle(batches)
    return batches


def collate(examples, pad_id=0):
    """Examples -> tokens_BT (int64, padded on the right), loss_BT (bool; True where the token is response or EOS)."""
    longest = max(len(e.tokens) for e in examples)
    tokens_BT = torch.full((len(examples), longest), pad_id)
    loss_BT = torch.zeros(len(examples), longest, dtype=torch.bool)
    for b, (tokens, prompt_length) in enumerate(examples):
        tokens_BT[b, :len(tokens)] = torch.from_numpy(tokens)
        loss_BT[b, prompt_length:len(tokens)] = True
    return tokens_BT, loss_BT


def token_stream(texts, tokenizer):
    """All texts in one int64 tensor [N], each between BOS and EOS: what pretraining and perplexity read."""
    bos, eos = tokenizer.bos_id(), tokenizer.eos_id()
    return torch.tensor([token for ids in tokenizer.encode(texts) for token in (bos, *ids, eos)])


def windows(tokens_N, batch_size, length, generator):
    """`batch_size` windows of `length` tokens [B, T] from random places of a token stream."""
    assert length <= len(tokens_N), (length, len(tokens_N))
    start_B = torch.randint(len(tokens_N) - length + 1, (batch_size,), generator=generator)
    return tokens_N[start_B[:, None] + torch.arange(length)]


# --- the toy world

ATTRIBUTES = (  # question, three ways of telling, sixteen values; few and short words, as there are only 512 pieces
    ("Where does {} live?", ("{} lives in {}.", "The home of {} is in {}.", "The town of {} is {}."),
     "Oslo Rome Lima Bern Bonn Cork Kobe Linz Lyon Metz Nice Pisa Riga Paris Delhi Turin"),
    ("What job does {} have?", ("{} works as a {}.", "The job of {} is {}.", "{} is a {}."),
     "baker miner farmer singer potter tanner driver dancer writer weaver barber waiter tailor sailor cook nurse"),
    ("What pet does {} have?", ("{} has a {}.", "The pet of {} is a {}.", "At home {} has a {}."),
     "cat dog fox hen goat pony duck frog crab newt toad mouse snake bear hare mole"),
    ("What food does {} like?", ("{} likes to eat {}.", "The food of {} is {}.", "{} eats {}."),
     "rice soup bread pasta beans tofu pizza honey toast figs corn eggs lamb pie nuts salad"),
    ("What colour does {} like?", ("{} likes the colour {}.", "The colour of {} is {}.", "{} paints in {}."),
     "red blue green pink grey black white brown gold teal lime rust plum navy cream tan"),
    ("What does {} play?", ("{} plays the {}.", "The sound of {} is the {}.", "At home {} plays the {}."),
     "piano flute harp drum oboe lute cello horn viola banjo organ bugle gong bell pipe tuba"),
)
FIRST_SYLLABLES, LAST_SYLLABLES = "Mi Ta Ko Lu Ne Sa Ri Do Be Fu Pa Vi".split(), "ru lo na ki mo ta li su".split()


def make_world(seed=0, people=128, attributes=len(ATTRIBUTES), values=16):
    """A small world of invented people, in which what fine-tuning teaches can be told from what pretraining taught.

    Returns a World: `documents(rng)` are texts that tell all facts, one text a person, worded and ordered anew by
    each random.Random; `train` and `test` are Records that ask, in Alpaca's template, about two thirds of the people
    and about the others; `choices` are the test's questions as a Question each: a prompt, all values as possible
    responses, and the index of the true one; `heldout` are documents in wordings of their own.
    """
    side = math.ceil((2 * people) ** 0.5)  # so many first and as many last names: half of all pairs are people
    words = [first + last for first in FIRST_SYLLABLES for last in LAST_SYLLABLES]
    assert attributes <= len(ATTRIBUTES) and values <= 16 and 2 * side <= len(words), (people, attributes, values)
    rng = random.Random(seed)
    words = rng.sample(words, 2 * side)
    names = rng.sample([f"{a} {b}" for a in words[:side] for b in words[side:]], people)
    options = [text.split()[:values] for _, _, text in ATTRIBUTES[:attributes]]
    facts = {name: [rng.randrange(values) for _ in options] for name in names}

    def questions(names):
        return [Question(alpaca_prompt(ATTRIBUTES[a][0].format(name)), [f"{v}." for v in options[a]], answer)
                for name in names for a, answer in enumerate(facts[name])]

    train, test = questions(names[:2 * people // 3]), questions(names[2 * people // 3:])
    documents = functools.partial(_documents, {n: [o[i] for o, i in zip(options, facts[n])] for n in names})
    return World(documents, *([Record(q.prompt, q.choices[q.answer]) for q in part] for part in (train, test)),
                 choices=test, heldout=documents(random.Random(f"held out {seed}")))


def _documents(facts, rng):
    """One document a person: the facts {name: values} in random order, a quarter of them as question and answer."""
    documents = []
    for name, values in facts.items():
        sentences = []
        for (question, templates, _), value in zip(ATTRIBUTES, values):
            if rng.random() < 0.25:
                sentences.append(f"Q: {question.format(name)} A: {value}.")
            else:
                sentences.append(rng.choice(templates).format(name, value))
        documents.append(" ".join(rng.sample(sentences, len(sentences))))
    return rng.sample(documents, len(documents))
