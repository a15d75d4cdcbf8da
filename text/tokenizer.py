"""Tokenizers: text to tokens and back, and a model's rules for the tokens around a text.

Two kinds stand behind `Tokenizer`: sentencepiece (LLaMA-1 and -2, Mistral; tokenizer.model) and
byte-level BPE (LLaMA-3, SmolLM2; tokenizer.json, or Meta's file for tiktoken). What is a control
token follows from the rules alone: a text that spells `</s>` or `<|eot_id|>` is a text like any
other. Control tokens come from these rules, and from a chat template (text/templates.py).
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from cli.errors import UserError
from cli.files import json_object, written_whole
from text import byte_level, sentencepieces
from text.records import read_text
from text.templates import Template, alpaca_template
from text.vocabulary import CONTROL, MOST, UNUSED, Vocabulary

MODEL, JSON = "tokenizer.model", "tokenizer.json"  # a folder has one of them, or both
GENERATION = "generation_config.json"
BESIDE = (  # what Hugging Face's folders have beside them
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    GENERATION,
)
CHAT_TEMPLATE = "chat_template.jinja"  # it comes before the one in tokenizer_config.json


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A vocabulary, and the rules of the model that was trained with it."""

    files: dict[str, bytes] = dataclasses.field(repr=False)  # it is saved as: names, contents
    vocabulary: Vocabulary = dataclasses.field(repr=False)
    bos: tuple[int, ...]  # what the model has before a text: one token, or none
    eos: int  # what ends a text; training learns it at the end of a response
    stops: tuple[int, ...]  # what ends generation: EOS, and perhaps others, such as a turn's end
    named_bos: int | None = None  # what the files name as BOS, even if texts begin without it

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without BOS and EOS."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """The tokens of each text; faster than one by one.

        Raises UserError where one would be a control token, as only an unfit tokenizer makes it.
        """
        encoded = self.vocabulary.encode_all(texts)
        for text, tokens in zip(texts, encoded, strict=True):
            if not self.controls.isdisjoint(tokens):
                piece = next(self.vocabulary.pieces[i] for i in tokens if i in self.controls)
                raise UserError(
                    f"the text {text[:40]!r} would become {piece!r}, which this tokenizer has for "
                    "the beginning or end of a text or another control token; use the model's own "
                    "tokenizer, with the files beside it"
                )
        return encoded

    @functools.cached_property
    def controls(self) -> frozenset[int]:
        """The tokens that no text may become: BOS, EOS and all control tokens."""
        kinds = enumerate(self.vocabulary.kinds)
        return frozenset([*self.bos, self.eos, *(i for i, kind in kinds if kind == CONTROL)])

    def encode_prompt(self, prompt: str) -> list[int]:
        """The tokens of a text that is to be continued, with what `framed` puts before it."""
        return self.framed(self.encode(prompt))

    def framed(self, tokens: list[int]) -> list[int]:
        """A prompt's tokens after BOS if the model has one; EOS if there would be none."""
        return [*self.bos, *tokens] or [self.eos]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens; control tokens have none.

        An embedding may have more rows than the tokenizer has pieces, padded to a round number.
        Tokens of such rows have no text.
        """
        kinds = self.vocabulary.kinds
        used = [i for i in tokens if i < len(kinds) and kinds[i] != UNUSED]
        return self.vocabulary.decode(used)

    def decode_answer(self, tokens: Sequence[int]) -> str:
        """The text of an answer's tokens, without the space that it may begin with."""
        text = self.decode(tokens)
        return text if self.vocabulary.adds_space else text.removeprefix(" ")

    @functools.cached_property
    def template(self) -> Template:
        """How a conversation becomes a text: the chat template among the files, else Alpaca's."""
        pieces = self.vocabulary.pieces
        controls = {pieces[i]: i for i in self.controls}
        source = self.chat_template or self.alpaca_template
        bos = "" if self.named_bos is None else pieces[self.named_bos]
        return Template(source, controls, bos, pieces[self.eos])

    @property
    def alpaca_template(self) -> str:
        """Alpaca's template, with BOS if the model has one."""
        return alpaca_template(bool(self.bos))

    @property
    def chat_template(self) -> str | None:
        """The chat template among the files; of several the default one. None if there is none."""
        if CHAT_TEMPLATE in self.files:
            return self.files[CHAT_TEMPLATE].decode()
        found = json.loads(self.files.get("tokenizer_config.json", b"{}")).get("chat_template")
        for named in found if isinstance(found, list) else ():
            if isinstance(named, dict) and named.get("name") == "default":
                found = named.get("template")
        return found if isinstance(found, str) else None

    def with_template(self, source: str) -> "Tokenizer":
        """The same tokenizer with another chat template, whose end of a turn is one of the stops.

        Raises UserError for a template that does not work.
        """
        files = self.files | {CHAT_TEMPLATE: source.encode()}
        stops = dataclasses.replace(self, files=files).answer_ends
        if stops != self.stops:  # so that other programs stop there too
            rules = json.loads(files.get(GENERATION, b"{}")) | {"eos_token_id": list(stops)}
            files[GENERATION] = json.dumps(rules, indent=1).encode()
        return dataclasses.replace(self, files=files, stops=stops)

    @functools.cached_property
    def answer_ends(self) -> tuple[int, ...]:
        """What ends a generated answer: the stops, and what the template ends a turn with.

        Raises UserError for a template that does not work.
        """
        end = self.template.end_of_turn
        return self.stops if end in self.stops else (*self.stops, end)

    def largest_id(self) -> int:
        """The largest id that a text can become, BOS and EOS included."""
        kinds = self.vocabulary.kinds
        used = [i for i, kind in enumerate(kinds) if kind not in (CONTROL, UNUSED)]
        return max([*used, *self.bos, self.eos])

    def check_fits(self, rows: int, whose: str | pathlib.Path) -> None:
        """Raises UserError unless every token that a text can become has one of `rows` rows."""
        if self.largest_id() >= rows:
            raise UserError(
                f"the tokenizer has {self.largest_id() + 1} pieces, but the embedding "
                f"(model.embed_tokens.weight) of {whose} has {rows} rows: they do not belong "
                "together; use the model's own tokenizer"
            )

    def digest(self) -> str:
        """SHA-256 of what decides a text's tokens: its file and, if others say more, the rules."""
        content, (pieces, kinds, *_) = self.files.get(MODEL), self.vocabulary
        sha = hashlib.sha256(content or self.files[JSON])
        rules = [self.bos, self.eos, self.stops]
        if rules != [(self.vocabulary.bos,), self.vocabulary.eos, (self.eos,)]:
            sha.update(json.dumps(rules).encode())
        own = sentencepieces.kinds_in(content) if content else []
        if kinds != own:
            changed = [i for i, kind in enumerate(own) if kind != kinds[i]]
            sha.update(json.dumps([pieces[len(own) :], kinds[len(own) :], *changed]).encode())
        return sha.hexdigest()

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes its files into a folder."""
        for name, content in self.files.items():
            (pathlib.Path(folder) / name).write_bytes(content)


# ---- from files


def load_tokenizer(path: str | pathlib.Path) -> Tokenizer:
    """Reads a tokenizer's file, or that of a model folder or of a run's base/.

    What stands beside the file, such as tokenizer_config.json, is read as well, but for Meta's file
    of LLaMA-3, whose rules are known. Raises UserError if there is no tokenizer, if it is damaged,
    or if it does not say what ends a text.
    """
    path = pathlib.Path(path)
    file = path if path.is_file() else find_tokenizer(path)
    content = file.read_bytes()
    if byte_level.is_tiktoken(content):
        return make_tokenizer(byte_level.from_tiktoken(content, file), file)
    is_json = file.suffix == ".json" or content.lstrip().startswith(b"{")
    files = {JSON if is_json else MODEL: content}
    for name in (*BESIDE, CHAT_TEMPLATE):
        if (file.parent / name).is_file():
            files[name] = (file.parent / name).read_bytes()
    if CHAT_TEMPLATE in files:
        read_text(file.parent / CHAT_TEMPLATE)  # refuses what is not UTF-8
    return make_tokenizer(files, file)


def find_tokenizer(folder: pathlib.Path) -> pathlib.Path:
    """The file of the tokenizer of a model folder or a run; UserError where there is none."""
    if not folder.is_dir():
        raise UserError(f"no tokenizer: {folder} does not exist; name the model's tokenizer.model")
    for place in (folder, folder / "base"):
        model, json_file = place / MODEL, place / JSON
        if model.is_file() and not (json_file.is_file() and is_tiktoken_file(model)):
            return model
        if json_file.is_file():  # with a file for tiktoken, it has the same tokens and says more
            return json_file
    raise UserError(
        f"no tokenizer: {folder / MODEL} does not exist, nor {JSON}; copy the model's there"
    )


def is_tiktoken_file(file: pathlib.Path) -> bool:
    """Whether a file is Meta's for tiktoken."""
    with file.open("rb") as f:
        return byte_level.is_tiktoken(f.read(200))


def make_tokenizer(files: dict[str, bytes], where: str | pathlib.Path) -> Tokenizer:
    """The tokenizer of its files' contents by name; `where` they come from is for errors.

    Raises UserError as `load_tokenizer` does.
    """
    beside = {}
    for name in BESIDE:
        path = pathlib.Path(where).with_name(name)
        beside[name] = json_object(files[name], path) if name in files else {}
    config, stops = read_rules(beside, where)
    controls = {config.get("bos_token"), config.get("eos_token"), *stops, *other_controls(beside)}
    if JSON in files:
        vocabulary = byte_level.open_json(files[JSON], controls, where)
    else:
        added = added_tokens(beside, where)
        vocabulary = sentencepieces.open_model(files[MODEL], added, controls, where)
    bos = id_of_named(config, "bos_token", vocabulary, where)
    eos = id_of_named(config, "eos_token", vocabulary, where)
    adds_bos = config.get("add_bos_token")
    if adds_bos is None:  # a tokenizer.json says so itself; LLaMA's tokenizer.model means it
        adds_bos = vocabulary.bos is not None or (MODEL in files and bos is not None)
    bos = vocabulary.bos if bos is None else bos
    # One that the vocabulary lacks, of another model's generation_config.json, ends nothing
    stops = [i for i in stops if i < len(vocabulary.pieces)]
    ends = [i for i in (eos, vocabulary.eos, *stops) if i is not None]
    if not ends or (adds_bos and bos is None):
        missing = "BOS" if ends else "EOS"
        raise UserError(f"{where} has no {missing}; use the tokenizer that belongs to the model")
    eos = ends[0]
    all_stops = tuple(dict.fromkeys([eos, *stops]))
    return Tokenizer(files, vocabulary, (bos,) if adds_bos else (), eos, all_stops, bos)


def read_rules(beside: dict[str, dict], where: str | pathlib.Path) -> tuple[dict, list[int]]:
    """(the fields about BOS and EOS, what ends generation) in the files beside a vocabulary.

    A token may be its text or an object with it; an empty one is none. Raises UserError for what is
    of another type.
    """
    config = {}
    for file in ("special_tokens_map.json", "tokenizer_config.json"):  # the second one decides
        for name in ("bos_token", "eos_token"):
            token = text_of(beside[file].get(name))
            if token and not isinstance(token, str):
                raise unfit(where, file, name, token)
            if token:
                config[name] = token
    adds_bos = config["add_bos_token"] = beside["tokenizer_config.json"].get("add_bos_token")
    if type(adds_bos) not in (bool, type(None)):
        raise unfit(where, "tokenizer_config.json", "add_bos_token", adds_bos)
    ids = beside["generation_config.json"].get("eos_token_id")
    ids = ids if isinstance(ids, list) else [ids] * (ids is not None)
    if not all(type(i) is int and 0 <= i < MOST for i in ids):
        raise unfit(where, "generation_config.json", "eos_token_id", ids)
    return config, ids


def other_controls(beside: dict[str, dict]) -> Iterator[str]:
    """The texts of further control tokens that the files beside a vocabulary name."""
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        others = beside[file].get("additional_special_tokens")
        for text in map(text_of, others if isinstance(others, list) else ()):
            if isinstance(text, str) and text:
                yield text


def text_of(token: Any) -> Any:
    """A token may be written as its text, or as an object with it."""
    return token.get("content") if isinstance(token, dict) else token


def unfit(where: str | pathlib.Path, file: str, name: str, value: Any) -> UserError:
    """The error for a field that has no sensible value."""
    path = pathlib.Path(where).with_name(file)
    return UserError(f"{path}: {name} = {json.dumps(value)[:60]} is not sensible; correct it")


def added_tokens(beside: dict[str, dict], where: str | pathlib.Path) -> dict[int, tuple[str, bool]]:
    """{id: (text, whether it is a control token)} of what was added to a sentencepiece model."""
    added = {}
    try:
        for text, i in beside["added_tokens.json"].items():
            added[int(i)] = text, True
        for i, token in beside["tokenizer_config.json"].get("added_tokens_decoder", {}).items():
            added[int(i)] = token["content"], bool(token.get("special", True))
        if not all(isinstance(text, str) and 0 <= i < MOST for i, (text, _) in added.items()):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
        raise UserError(
            f"{where}: the added tokens beside it are damaged; copy added_tokens.json and "
            "tokenizer_config.json again"
        ) from None
    return added


def id_of_named(
    config: dict, name: str, vocabulary: Vocabulary, where: str | pathlib.Path
) -> int | None:
    """The id of the token that a config calls bos_token or eos_token; None where it names none."""
    token = config.get(name)
    if token is None:
        return None
    if token not in vocabulary.pieces:
        raise UserError(
            f"{where} has no {token!r}, which the files beside it name as {name}; they do not "
            "belong together, copy the model's own"
        )
    return vocabulary.pieces.index(token)


def train_tokenizer(texts: Iterable[str], path: str | pathlib.Path, vocab_size: int) -> Tokenizer:
    """Trains a sentencepiece tokenizer, writes it to the file `path` and returns it.

    See `sentencepieces.train_model`.
    """
    model = sentencepieces.train_model(texts, vocab_size)
    with written_whole(path) as beside:
        beside.write_bytes(model)
    return load_tokenizer(path)
