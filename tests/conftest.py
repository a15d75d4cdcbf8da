"""What all tests share: hypothesis' profile, fixtures, and what may be skipped."""

import os
import pathlib
import random
import tempfile

import hypothesis
import pytest
import torch

from text.templates import alpaca_prompt
from text.tokenizer import load_tokenizer, train_tokenizer
from text.toy import make_world

GIVEN = dict(os.environ)
# The suite is about the CPU, where equal bits can be promised and where a process can be forked
# after any test. So a GPU is hidden, and no command takes it for its default. test_gpu.py shows it
# to processes of its own, and sets this variable for them.
if "QALORA_TESTS_ON_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported; any test may do that

# No test reaches Hugging Face or sees what was fetched from it: nobody listens at this port, and
# the cache is empty. huggingface_hub reads these when it is imported
for name in ("HF_TOKEN", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE"):
    os.environ.pop(name, None)
HF_HOME = tempfile.TemporaryDirectory(prefix="qalora-hf-home-")
os.environ["HF_HOME"] = HF_HOME.name
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
os.environ["NO_PROXY"] = "127.0.0.1"

ROOT = pathlib.Path(__file__).resolve().parent.parent

# Time never decides a test. A failing example prints what reproduces it.
hypothesis.settings.register_profile(
    "qalora",
    deadline=None,
    print_blob=True,
    max_examples=50,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("qalora")
torch.set_num_threads(1)  # small matrices: a second thread mostly waits

pytest_plugins = ["fixtures_gguf", "fixtures_runs", "fixtures_text"]
MAY_SKIP = ("needs a GPU", "needs ../shared/data")


@pytest.fixture(scope="session")
def material():
    """A function from a name to its path in ../shared/data; skips the test if that is missing."""

    def find(name):
        path = ROOT.parent / "shared" / "data" / name
        if not path.exists():
            pytest.skip(f"needs ../shared/data/{name}")
        return path

    return find


@pytest.fixture(scope="session")
def toy_world():
    return make_world()


@pytest.fixture(scope="session")
def toy_tokenizer(toy_world, tmp_path_factory):
    texts = toy_world.documents(random.Random(0))
    texts += [f"{alpaca_prompt(asked.text)} {answer.text}" for asked, answer in toy_world.train]
    return train_tokenizer(texts, tmp_path_factory.mktemp("toy") / "tokenizer.model", 512)


@pytest.fixture(params=["toy", "llama"])
def any_tokenizer(request):
    """The toy's tokenizer, then LLaMA's."""
    if request.param == "toy":
        return request.getfixturevalue("toy_tokenizer")
    return load_tokenizer(request.getfixturevalue("material")("llama-tokenizer.model"))


def judged(report):
    """Under CI, a test skipped for a reason that is not in MAY_SKIP has failed."""
    if os.environ.get("CI") and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not reason.startswith(MAY_SKIP):
            report.outcome, report.longrepr = "failed", f"skipped under CI: {reason}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    return judged((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    return judged((yield))  # a whole file
