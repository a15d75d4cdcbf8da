"""Jobs in several processes, each done once: what is finished is kept in a file."""

import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator

import torch


@contextlib.contextmanager
def pool_of(workers: int) -> Iterator[concurrent.futures.Executor]:
    """A pool of processes. An exception, such as Ctrl-C, ends them at once, with what is queued."""
    context = multiprocessing.get_context("spawn")
    executor = concurrent.futures.ProcessPoolExecutor
    with executor(workers, context, initializer=prepare_worker) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def prepare_worker() -> None:
    """One thread, as matrices are small; no progress bars, as two would overwrite each other."""
    torch.set_num_threads(1)
    sys.stderr = pathlib.Path(os.devnull).open("w")  # noqa: SIM115, open to the end


def run_and_keep(
    pool: concurrent.futures.Executor,
    kept: pathlib.Path,
    run: Callable,
    jobs: dict[str, tuple],
    tell: Callable[[str, list], None],
) -> dict[str, list]:
    """{name: run(*arguments)} for jobs {name: arguments}: run, or found in the file `kept`.

    The file gets a line when a job is done. tell(progress, result) is called then.
    """
    done = read_kept(kept)
    start, running = time.monotonic(), {}
    for name, arguments in jobs.items():
        if name not in done:
            running[pool.submit(run, *arguments)] = name
    if len(running) < len(jobs):
        print(f"{len(jobs) - len(running)} of {len(jobs)} jobs are done already, in {kept}")
    for count, future in enumerate(concurrent.futures.as_completed(running), 1):
        name, result = running[future], future.result()
        done[name] = result
        with kept.open("a") as file:
            file.write("\n" + json.dumps([name, result]))  # a cut line before it ends here
        tell(f"{count}/{len(running)}, {time.monotonic() - start:.0f} s", result)
    return {name: done[name] for name in jobs}


def read_kept(path: pathlib.Path) -> dict[str, list]:
    """{name: result}. A line that a process was killed while writing does not count."""
    done = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            name, result = json.loads(line)
            done[name] = result
    return done
