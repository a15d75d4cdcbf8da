"""Jobs in several processes, each done once: what is finished is kept in a file."""

import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool

import torch

from cli.errors import UserError


@contextlib.contextmanager
def pool_of(workers: int) -> Iterator[concurrent.futures.Executor]:
    """A pool of processes. An exception, such as Ctrl-C, ends them at once, with what is queued.

    Raises UserError when one of them is killed.
    """
    context = multiprocessing.get_context("spawn")
    executor = concurrent.futures.ProcessPoolExecutor
    with executor(workers, context, initializer=prepare_worker) as pool:
        start_deaf_to_ctrl_c(pool, workers)
        try:
            yield pool
        except BaseException as e:
            for process in multiprocessing.active_children():
                process.terminate()
            if not isinstance(e, BrokenProcessPool):
                raise
            raise UserError(
                "a process was killed, as the system does when memory runs out; lower --workers, "
                "and the same command goes on"
            ) from None


def start_deaf_to_ctrl_c(pool: concurrent.futures.Executor, workers: int) -> None:
    """Starts all processes. Ctrl-C reaches them as well, and would end each in a traceback."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which they inherit
    for _ in range(workers):
        pool.submit(os.getpid)
    signal.signal(signal.SIGINT, before)


def prepare_worker() -> None:
    """One thread, as matrices are small; no progress bars, as two would overwrite each other."""
    torch.set_num_threads(1)
    sys.stderr = pathlib.Path(os.devnull).open("w")  # noqa: SIM115, open to the end
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    """Ends this process when the one that started it is gone, however that came about."""
    multiprocessing.parent_process().join()
    os._exit(1)


def call_all(pool: concurrent.futures.Executor, function: Callable, calls: Iterable) -> None:
    """function(*arguments) for all arguments in `calls`, in the pool."""
    # Not pool.map, which cancels the rest on an error: Python 3.11's pool does not survive that
    for future in [pool.submit(function, *arguments) for arguments in calls]:
        future.result()


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
    """{name: result}. A line that is not whole, as its process was killed, does not count."""
    done = {}
    for line in path.read_bytes().split(b"\n") if path.exists() else []:
        with contextlib.suppress(ValueError, RecursionError):
            match json.loads(line):
                case [str(name), list(result)]:
                    done[name] = result
    return done
