"""What all tests share: the hypothesis profile, the material in ../shared/data, and what may be skipped."""

import os
import pathlib
import sys

import hypothesis
import pytest
import torch

GIVEN = dict(os.environ)
# The suite is about the CPU, where equal bits can be promised and a process can be forked after any test. A GPU is hidden
# from it, so that no command takes it for its default; test_gpu.py, which shows it to processes of its own, sets this.
if "QALORA_TESTS_ON_GPU" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which torch may do in any test

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Time never decides a test, and a failing example prints what reproduces it.
hypothesis.settings.register_profile("qalora", deadline=None, print_blob=True, max_examples=50,
                                     suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("qalora")
torch.set_num_threads(1)  # small matrices: a second thread mostly waits, and with company for ages

MAY_SKIP = ("needs a GPU", "needs ../shared/data")


@pytest.fixture(scope="session")
def material():
    """A function from a name to its path in ../shared/data; the test is skipped where that is missing."""
    def find(name):
        path = ROOT.parent / "shared" / "data" / name
        if not path.exists():
            pytest.skip(f"needs ../shared/data/{name}")
        return path
    return find


def judged(report):
    """Under CI, what is skipped for any reason but those in MAY_SKIP has failed."""
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
