"""One thread for the model, and who is next: requests run whole, in the order in which they came.

All products run in the same thread: a new one would bring a pool of its own to every request.
"""

import contextlib
import queue
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from flashhead.errors import FlashHeadError

Event = dict[str, Any]
Work = Callable[[], Generator[Event, None, None]]
MOST_WAITING = 16


class Job:
    """A request that waits, runs or has ended.

    Args:
        work: makes the events; closed early, it must stop.

    `events` ends with None. `cancelled` stops the work before its next event.
    """

    def __init__(self, work: Work) -> None:
        self.work = work
        self.events: queue.Queue[Event | None] = queue.Queue()
        self.cancelled = threading.Event()
        self.future: Future[None] | None = None

    def error(self) -> BaseException | None:
        """What the work raised; to be asked after the last event."""
        assert self.future is not None
        return self.future.exception()


class Turns:
    """The queue in front of the model. `submitted` counts requests."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model")
        self._lock = threading.Lock()
        self._jobs: list[Job] = []
        self._closed = False
        self.submitted = 0

    def submit(self, work: Work) -> Job:
        """Queue a request.

        Raises:
            FlashHeadError: too many wait already, or the server is about to end.
        """
        job = Job(work)
        with self._lock:
            if self._closed:
                raise FlashHeadError("the server is about to end")
            if len(self._jobs) > MOST_WAITING:
                raise FlashHeadError(f"{MOST_WAITING} requests wait already: try again later")
            self._jobs.append(job)
            self.submitted += 1
            job.future = self._pool.submit(self._run, job)
        return job

    def warm_up(self, work: Work) -> None:
        """Run work whose events nobody reads, in the thread that requests will run in."""
        self._pool.submit(lambda: list(work())).result()

    def ahead(self, job: Job) -> int:
        """Requests before this one that have not ended or been cancelled."""
        with self._lock:
            if job not in self._jobs:
                return 0
            before = self._jobs[: self._jobs.index(job)]
            return sum(not other.cancelled.is_set() for other in before)

    def close(self) -> None:
        """Stop what runs after its current token, drop what waits, and end the thread."""
        with self._lock:
            self._closed = True
            for job in self._jobs:
                job.cancelled.set()
        self._pool.shutdown()

    def _run(self, job: Job) -> None:
        try:
            if not job.cancelled.is_set():  # a client may leave while it waits
                with contextlib.closing(job.work()) as events:
                    for event in events:
                        job.events.put(event)
                        if job.cancelled.is_set():
                            break
        finally:
            with self._lock:
                self._jobs.remove(job)
            job.events.put(None)
