"""Weights and data from Hugging Face, fetched into its own cache, where other programs find them.

ORG/NAME names a repository there, ORG/NAME:FILE one file of it. Only the files that are needed are
fetched. Every call looks up the newest version; without a network, what an earlier call has fetched
is used. The environment variable HF_HOME moves the cache.
"""

import errno
import pathlib
import re
import shutil

from cli import machine
from cli.errors import UserError
from cli.files import read_json

REPOSITORIES = {  # beside llama.CONFIGS: where the weights of each size are
    "7b": "huggyllama/llama-7b",
    "13b": "huggyllama/llama-13b",
    "33b": "huggyllama/llama-30b",
    "65b": "huggyllama/llama-65b",
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "llama2-13b": "meta-llama/Llama-2-13b-hf",
    "llama2-70b": "meta-llama/Llama-2-70b-hf",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama3.2-3b": "meta-llama/Llama-3.2-3B",
    "tinyllama-1.1b": "TinyLlama/TinyLlama_v1.1",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B",
}
ALPACA_DATA = "yahma/alpaca-cleaned:alpaca_data_cleaned.json"  # JSON, so that nobody needs pyarrow

KINDS = {"weights": "model", "data": "dataset"}  # what each setting names, as Hugging Face says
INSTEAD = {
    "weights": "put the files into a folder and name it by --weights",
    "data": "name a file of your own by --data",
}
WORD = r"\w+(?:[.-]\w+)*"
REPOSITORY = re.compile(rf"{WORD}/{WORD}(:[^:]+)?", re.ASCII)
BESIDE_WEIGHTS = (
    "config.json",
    "quantize_config.json",
    "generation_config.json",
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # or several with an index; the first is taken
DATA_ENDINGS = (".json", ".jsonl", ".csv", ".parquet", ".txt")
FILE_ENDINGS = (*DATA_ENDINGS, ".gz", ".gguf", ".safetensors", ".bin", ".pth", ".model")
TIMEOUT = 10  # seconds for the first answer; without one huggingface_hub would wait for minutes


class Unreachable(UserError):
    """Nothing can be fetched now: there is no network, no answer, or no huggingface_hub."""

    def __init__(self, why: str, advice: str):
        super().__init__(f"{why}; {advice}")
        self.why = why


def is_repository(text: str) -> bool:
    """Whether `text` is ORG/NAME or ORG/NAME:FILE, and no file or folder here has that name.

    data/alpaca.json is not: a NAME that ends like a file's is taken for a path that is wrong.
    """
    if not REPOSITORY.fullmatch(text) or pathlib.Path(text).exists():
        return False
    return ":" in text or not text.lower().endswith(FILE_ENDINGS)


def fetch_weights(name: str) -> pathlib.Path:
    """The folder of the weights ORG/NAME, or the file of ORG/NAME:FILE.gguf, in the cache.

    Fetches what is not there yet. Raises UserError where that fails, Unreachable where it might
    have worked with a network.
    """
    file = name.partition(":")[2]
    if file and not file.lower().endswith(".gguf"):
        raise UserError(f"--weights {name}: only a .gguf file is fetched alone; leave out :{file}")
    folder, _ = fetch("weights", name)
    return folder / file if file else folder


def fetch_data(name: str) -> pathlib.Path:
    """The file ORG/NAME:FILE of a data set, or the only one that it has, in the cache.

    Fetches it if it is not there yet. Raises UserError and Unreachable as `fetch_weights` does.
    """
    folder, (file,) = fetch("data", name)
    return folder / file


def fetch(setting: str, name: str) -> tuple[pathlib.Path, list[str]]:
    """(the repository's folder in the cache, the names of the needed files, which are all there).

    setting: "weights" or "data". Prints where they are, or what is fetched. Raises UserError, and
    Unreachable where it might work with a network.
    """
    require_package()
    try:
        info = look_up(setting, name)
    except Unreachable as e:
        return find_in_cache(setting, name, e)
    needed = needed_files(setting, name, [file.rfilename for file in info.siblings])
    folder = storage_of(setting, name) / "snapshots" / info.sha
    missing = missing_files(info.siblings, needed, folder)
    if missing:
        announce(setting, name, missing, len(needed))
        check_room(name, sum(missing.values()))
    else:
        tell(f"{setting}: {name} is in {folder}")
    download(setting, name, needed, folder)
    return folder, needed


# ---- which files


def needed_files(setting: str, name: str, names: list[str]) -> list[str]:
    """Of a repository's files those that are needed; UserError where they cannot be told."""
    repository, _, file = name.partition(":")
    if not file:
        chosen = weight_files if setting == "weights" else data_files
        return chosen(repository, names)
    if file not in names:
        raise UserError(f"{repository} has no file {file}; it has {listed(names, 8)}")
    return [file]


def weight_files(repository: str, names: list[str]) -> list[str]:
    """config.json, the tokenizer and the weights; never what lies in a subfolder.

    Raises UserError for a repository without them.
    """
    weights = files_of_weights(names)
    if "config.json" in names and weights:
        return [*(n for n in BESIDE_WEIGHTS if n in names), *weights]
    gguf = [n for n in names if n.lower().endswith(".gguf")]
    if gguf:
        raise UserError(
            f"{repository} holds GGUF files; name one, as --weights {repository}:FILE, where FILE "
            f"is {listed(gguf, 5)}"
        )
    raise UserError(
        f"{repository} has no config.json with model.safetensors or pytorch_model.bin files; it "
        f"has {listed(names, 5)}"
    )


def files_of_weights(names: list[str]) -> list[str]:
    """The one file, or the index and all the files beside it; those that `formats` would open."""
    for single in WEIGHTS:
        if single in names:
            return [single]
        index = f"{single}.index.json"
        if index in names:
            start, ending = single.split(".")
            parts = [n for n in names if n.startswith(start) and n.endswith(f".{ending}")]
            return [index, *(n for n in parts if "/" not in n)]
    others = [n for n in names if n.endswith(".safetensors") and "/" not in n]
    indexes = [n for n in names if n.endswith(".safetensors.index.json") and "/" not in n]
    named_by_gptq = (len(others) == 1 or len(indexes) == 1) and "quantize_config.json" in names
    return [*indexes, *others] if named_by_gptq else []


def data_files(repository: str, names: list[str]) -> list[str]:
    """The one file of records in a data set; UserError where there is none, or several."""
    found = []
    for name in names:
        is_record = name.lower().removesuffix(".gz").endswith(DATA_ENDINGS)
        if is_record and name != "dataset_infos.json":
            found.append(name)
    if len(found) == 1:
        return found
    if not found:
        raise UserError(
            f"{repository} has no file that ends in {', '.join(DATA_ENDINGS)}; it has "
            f"{listed(names, 8)}"
        )
    raise UserError(
        f"{repository} has several files; name one, as --data {repository}:FILE, where FILE is "
        f"{listed(found, 8)}"
    )


def listed(names: list[str], most: int) -> str:
    """Names for a message: the first ones, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "no files") + more


# ---- Hugging Face's cache


def require_package() -> None:
    """Raises Unreachable where huggingface_hub is missing."""
    try:
        import huggingface_hub  # noqa: F401, here and below not at the top, as few runs need it
    except ImportError as e:
        why = "fetching from Hugging Face needs huggingface_hub"
        raise Unreachable(why, "run: pip install huggingface_hub") from e


def cache_folder() -> pathlib.Path:
    """Where Hugging Face's programs keep what they fetch."""
    from huggingface_hub import constants

    return pathlib.Path(constants.HF_HUB_CACHE).absolute()


def storage_of(setting: str, name: str) -> pathlib.Path:
    """The folder of a repository in the cache: refs/, snapshots/COMMIT/ of links into blobs/."""
    from huggingface_hub.file_download import repo_folder_name

    repository = name.partition(":")[0]
    return cache_folder() / repo_folder_name(repo_id=repository, repo_type=KINDS[setting])


def missing_files(files: list, needed: list[str], folder: pathlib.Path) -> dict[str, int]:
    """{name: size} of the needed files; not of those that an older version in the cache has too."""
    missing = {}
    for file in files:
        blob = file.lfs.sha256 if file.lfs else str(file.blob_id)
        places = (folder / file.rfilename, folder.parents[1] / "blobs" / blob)
        if file.rfilename in needed and not any(place.exists() for place in places):
            missing[file.rfilename] = file.size or 0
    return missing


def find_in_cache(
    setting: str, name: str, unreachable: Unreachable
) -> tuple[pathlib.Path, list[str]]:
    """What `fetch` returns, as it was fetched before; raises `unreachable` where it was not."""
    storage = storage_of(setting, name)
    newest = storage / "refs" / "main"
    if not newest.is_file():
        raise unreachable
    folder = storage / "snapshots" / newest.read_text().strip()
    names = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            names.append(path.relative_to(folder).as_posix())
    try:
        needed = needed_files(setting, name, names)
    except UserError:
        raise unreachable from None
    for file in needed:
        if file.endswith(".index.json"):
            parts = read_json(folder / file).get("weight_map")
            if not (isinstance(parts, dict) and set(parts.values()) <= set(names)):
                raise unreachable
    tell(f"{setting}: {name} as fetched before is in {folder} ({unreachable.why})")
    return folder, needed


def check_room(name: str, need: int) -> None:
    """Raises UserError where the cache's disk has no room for `need` bytes."""
    if machine.RANK != 0:  # what the first process fetches meanwhile would be counted twice
        return
    cache = place = cache_folder()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if need > free:
        raise UserError(
            f"{cache} has {in_bytes(free)} free where {name} needs {in_bytes(need)}; choose a disk "
            "with more room by the environment variable HF_HOME"
        )


# ---- over the network


def look_up(setting: str, name: str):  # noqa: ANN201, huggingface_hub's ModelInfo or DatasetInfo
    """Commit, names and sizes of a repository's newest version; UserError as `fetch` raises it."""
    from huggingface_hub import HfApi

    try:
        return HfApi().repo_info(
            name.partition(":")[0],
            repo_type=KINDS[setting],
            files_metadata=True,
            timeout=TIMEOUT,
        )
    except Exception as e:  # those of its HTTP client too, which is another in every version
        raise explained(e, setting, name) from e


def download(setting: str, name: str, files: list[str], folder: pathlib.Path) -> None:
    """Fetches the files of a repository that `folder`, its newest version in the cache, lacks.

    Raises UserError where that fails.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    if machine.RANK != 0:
        disable_progress_bars()
    repository = name.partition(":")[0]
    for file in files:  # one after another: with several threads Ctrl-C would wait for all of them
        if (folder / file).exists():
            continue
        try:
            # Of "main" and not of a commit: so the cache knows the newest version when offline
            hf_hub_download(repository, file, repo_type=KINDS[setting])
        except Exception as e:  # those of its HTTP client and of hf_xet too
            raise explained(e, setting, name, is_download=True) from e
        if not (folder / file).exists():
            raise UserError(f"{repository} has just changed; run the same command again")


def announce(setting: str, name: str, missing: dict[str, int], count: int) -> None:
    """Prints what is fetched, from where and to where: some of `count` files."""
    from huggingface_hub import constants

    files = f"{count} file{'s' if count != 1 else ''}"
    if len(missing) < count:
        files = f"{len(missing)} of {files}"
    size = in_bytes(sum(missing.values()))
    where = f"into {cache_folder()} ({constants.ENDPOINT})"
    tell(f"{setting}: fetching {name}, {files}, {size}, {where}")


def tell(text: str) -> None:
    """Prints a line, once for all processes and before the progress bars that follow."""
    if machine.RANK == 0:
        print(text, flush=True)


def in_bytes(size: int) -> str:
    """A size for people: "13.48 GB"."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size} bytes"


# ---- what went wrong


def explained(error: Exception, setting: str, name: str, is_download: bool = False) -> UserError:
    """What to tell the user about an exception of huggingface_hub."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__:
        error = error.__cause__  # itself it only says that the cache has not got it either
    known = refusal(error, setting, name) or disk_trouble(error)
    if known:
        return known
    reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
    if is_download:
        return UserError(
            f"the download of {name} failed ({reason}); run the same command again: the files that "
            "have arrived stay"
        )
    if isinstance(error, errors.HFValidationError):
        return UserError(f"--{setting} {name}: {reason}")
    why = f"{constants.ENDPOINT} cannot be reached ({reason})"
    if isinstance(error, errors.OfflineModeIsEnabled):
        why = "the environment variable HF_HUB_OFFLINE forbids the network"
    elif isinstance(error, ValueError | KeyError | TypeError):  # such as a hotel's page for guests
        why = f"{constants.ENDPOINT} does not answer as Hugging Face does ({reason})"
    why = f"there is no {name} here, and {why}"
    return Unreachable(why, f"connect to fetch it, or {INSTEAD[setting]}")


def refusal(error: Exception, setting: str, name: str) -> UserError | None:
    """What to tell about an answer of the server that refuses something; None for other errors."""
    from huggingface_hub import constants, errors

    site, kind, repository = constants.ENDPOINT, KINDS[setting], name.partition(":")[0]
    status = getattr(getattr(error, "response", None), "status_code", 0)
    if isinstance(error, errors.GatedRepoError):
        page = f"{site}/{'datasets/' if kind == 'dataset' else ''}{repository}"
        return UserError(
            f"{repository} is gated: accept its licence on {page}, then log in with `hf auth login`"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return UserError(
            f"--{setting} {name}: there is no such file or folder here, and on {site} there is no "
            f"{kind} {repository}, or it is private; check the name, or log in: hf auth login"
        )
    if status == 429 or status >= 500:
        why = f"{site} answers with error {status}"
        return Unreachable(why, f"fetch {name} later, or {INSTEAD[setting]}")
    if status in (401, 403):
        return UserError(f"{site} refuses {repository} (error {status}); log in: hf auth login")
    if status:
        return UserError(
            f"{site} does not have all of {repository} that it lists (error {status}); try again "
            f"later, or {INSTEAD[setting]}"
        )
    return None


def disk_trouble(error: Exception) -> UserError | None:
    """What to tell about an error of the cache's disk; None for other errors."""
    elsewhere = "choose another place by the environment variable HF_HOME"
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "No space left" in str(error):  # hf_xet has no error class of its own for it
        return UserError(f"the disk of {cache_folder()} is full; free some space, or {elsewhere}")
    if isinstance(error, OSError) and error.filename:
        return UserError(f"{error.filename} cannot be written ({error.strerror}); {elsewhere}")
    return None
