"""The runner: one thread that steps a scheduler while there is work; and requests, by which others wait for theirs.

The thread starts with the first request and waits for more; it ends with the model, and at the end of the process. In
a forked process a new one starts, and nothing is left of the parent's requests.
"""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from collections.abc import Sequence as SequenceOf
from concurrent.futures import Future, wait
from functools import partial
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from .completion import Piece
from .errors import ArgumentError
from .scheduler import Scheduler
from .task import Task

T = TypeVar("T")

END_SECONDS = 10.0  # a process waits so long for its threads: one may hang on a lock that an interrupted one has kept


class Request(Future[T], Generic[T]):
    """A task on its way, as a future: `result(timeout)`, `cancel()`, `done()`, `exception()`, `add_done_callback`.

    Iterating, also with `async for`, gives the pieces of its text as they come, from the first one each time, and
    raises what the request ended with. `await asyncio.wrap_future(request)` waits without blocking. Cancelling takes
    effect within an operation of the step that runs; a request that nobody waits for runs to its end.
    """

    def __init__(self, runner: Runner, task: Task) -> None:
        super().__init__()
        self._way: tuple[Runner, Task] | None = (runner, task)  # until it has ended: it keeps the model
        self._watchers: list[Callable[[], None]] = []  # of who iterates: called when there is more, or it has ended
        self.pieces: list[Piece] = []  # so far, of the first text

    def cancel(self) -> bool:
        """Ends the request; returns False if it has ended already."""
        way = self._way
        if way is None:
            return self.cancelled()
        way[0].cancel(way[1])
        return True

    def result(self, timeout: float | None = None) -> T:
        """What it gives, once that is there; raises what it ended with, CancelledError, or TimeoutError."""
        self._may_wait()
        return super().result(timeout)

    def wait(self) -> T:
        """`result()`; but what interrupts it, as Ctrl-C does, cancels the request and lets it give its pages back."""
        return wait_all([self])[0]

    def join(self) -> None:
        """Waits until it has ended, in whatever way."""
        self._may_wait()
        wait([self])

    def _may_wait(self) -> None:
        """Raises `ArgumentError` in the thread that steps, as in a callback: it would wait for itself."""
        way = self._way
        if way is not None and way[0].is_here():
            raise ArgumentError("request: expected to be waited for outside of callbacks, got a wait in one")

    def watched(self) -> bool:
        """Whether somebody iterates."""
        return bool(self._watchers)

    def push(self, piece: Piece) -> None:
        """Adds a piece; for the thread that steps."""
        self.pieces.append(piece)
        self._tell()

    def settle(self, task: Task, result: Callable[[], T]) -> None:
        """Ends it as the task has ended; for the thread that steps."""
        self._way = None
        if task.error is not None:
            self.set_exception(task.error)
        elif task.cancelled:
            super().cancel()
            self.set_running_or_notify_cancel()
        else:
            try:
                self.set_result(result())
            except Exception as error:
                self.set_exception(error)
        self._tell()

    def _tell(self) -> None:
        """Wakes those who iterate. They watch first and look then, so no lock is needed: nobody misses what comes."""
        for watcher in self._watchers[:]:
            watcher()

    def __iter__(self) -> Iterator[Piece]:
        changed: SimpleQueue[None] = SimpleQueue()
        watcher, n = partial(changed.put, None), 0
        self._watchers.append(watcher)
        try:
            while True:
                self._may_wait()
                ended = self.done()
                while n < len(self.pieces):
                    yield self.pieces[n]
                    n += 1
                if ended:
                    break
                changed.get()
        finally:
            self._watchers.remove(watcher)
        self.result()

    async def __aiter__(self) -> AsyncIterator[Piece]:
        import asyncio  # slow to import, and there already where an event loop runs

        loop, changed, n = asyncio.get_running_loop(), asyncio.Event(), 0

        def watcher() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(changed.set)

        self._watchers.append(watcher)
        try:
            while True:
                changed.clear()
                ended = self.done()
                while n < len(self.pieces):
                    yield self.pieces[n]
                    n += 1
                if ended:
                    break
                await changed.wait()
        finally:
            self._watchers.remove(watcher)
        self.result()


def wait_all(requests: SequenceOf[Request[T]]) -> list[T]:
    """The results of all; if one fails, or something interrupts this, all are cancelled and give their pages back."""
    try:
        return [request.result() for request in requests]
    except BaseException:
        for request in requests:
            request.cancel()
        for request in requests:
            request.join()
        raise


class Stream:
    """The pieces of a request, of which nobody else knows: dropping or closing it cancels the request."""

    def __init__(self, request: Request[Any]) -> None:
        self.request = request
        self._pieces = iter(request)

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Piece:
        try:
            return next(self._pieces)
        except StopIteration:
            raise
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the request, unless it has ended, and lets it give its pages back."""
        self.request.cancel()
        self.request.join()

    def __del__(self) -> None:
        self.request.cancel()


class Runner:
    """Runs a scheduler's tasks in a thread of its own. Any thread may call it."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.lock = threading.RLock()  # held by whoever uses the scheduler: between two steps it is free
        self.may_step = threading.Event()
        self._thread: threading.Thread | None = None
        self._open()
        _runners.add(self)

    def _open(self) -> None:
        self._inbox = Inbox()
        self._starting = threading.Lock()
        self.may_step.set()
        weakref.finalize(self, self._inbox.close).atexit = False

    def submit(self, task: Task, result: Callable[[], T]) -> Request[T]:
        """Lets a task run; `result` is called when it has finished. Raises `ArgumentError` if it never could."""
        self.scheduler.check(task)
        request: Request[T] = Request(self, task)
        task.on_piece = request.push
        task.watched = request.watched
        task.on_end = lambda: request.settle(task, result)
        self._inbox.put(lambda scheduler: scheduler.add(task))
        self._ensure_thread()
        return request

    def cancel(self, task: Task) -> None:
        """Ends a task soon."""
        task.cancelled = True
        self._inbox.put(lambda scheduler: scheduler.cancel(task))
        self.scheduler.stop_cancelled()

    def _ensure_thread(self) -> None:
        with self._starting:
            if self._thread is None or not self._thread.is_alive():
                arguments = (weakref.ref(self), self._inbox)
                self._thread = threading.Thread(target=serve, args=arguments, name="pyengine", daemon=True)
                self._thread.start()

    def is_here(self) -> bool:
        """Whether the thread that calls is the one that steps."""
        return threading.current_thread() is self._thread

    def run(self) -> None:
        """Steps until there is nothing to do; for the thread."""
        while True:
            self.may_step.wait()
            with self.lock:
                for message in self._inbox.take():
                    message(self.scheduler)
                if not self.scheduler.busy:
                    return
                self.scheduler.step(self._inbox.has_messages)

    def close(self, seconds: float | None = None) -> None:
        """Cancels all requests and ends the thread; waits for that, for so many seconds at most."""
        self._inbox.put(lambda scheduler: scheduler.close())
        self._inbox.close()
        self.scheduler.executor.stop()
        if self._thread is not None and not self.is_here():
            self._thread.join(seconds)

    def forget(self) -> None:
        """In a forked process: drops what the parent's threads were about, and lets a new thread start."""
        self._thread = None
        self._open()
        for task in [*self.scheduler.live, *self.scheduler.waiting]:
            task.on_end = None
        self.scheduler.close()


Message = Callable[[Scheduler], None]


class Inbox:
    """What the thread is told. It doesn't know the runner, so that a model that nobody uses any more can go.

    `put` is C, and Ctrl-C comes before or after it. In a `threading.Condition`, which is Python, it may come between
    taking the lock and the block that gives it back; then the thread waits forever, and the process for the thread.
    """

    def __init__(self) -> None:
        self._queue: SimpleQueue[Message | None] = SimpleQueue()  # None: there will be no more
        self._heard: deque[Message] = deque()  # by `wait`, not taken yet
        self._closed = False

    def put(self, message: Message) -> None:
        self._queue.put(message)

    def has_messages(self) -> bool:
        """Whether somebody waits to be heard."""
        return bool(self._heard) or not self._queue.empty()

    def take(self) -> Iterator[Message]:
        """Those that are there, for the only thread that takes any."""
        while self.has_messages():
            if not self._heard:
                self._hear()
            while self._heard:
                yield self._heard.popleft()

    def wait(self) -> bool:
        """Waits for messages; False if there will be none."""
        while not (self._closed or self._heard):
            self._hear()
        return self.has_messages()

    def _hear(self) -> None:
        message = self._queue.get()
        if message is None:
            self._closed = True
        else:
            self._heard.append(message)

    def close(self) -> None:
        self._queue.put(None)


def serve(owner: weakref.ref[Runner], inbox: Inbox) -> None:
    """What the thread does."""
    while inbox.wait():
        runner = owner()
        if runner is None:
            return
        runner.run()
        del runner


# All runners: a fork waits for the step that runs, and the process ends when no engine computes any more.
_runners: weakref.WeakSet[Runner] = weakref.WeakSet()


def _close_all() -> None:
    for runner in list(_runners):
        runner.close(END_SECONDS)


_forking: list[Runner] = []


def _before_fork() -> None:
    _forking.extend(_runners)
    for runner in _forking:
        runner.may_step.clear()  # or else its thread would take the lock again before we get it
    for runner in _forking:
        runner.lock.acquire()
    for runner in _forking:  # only now: a step that we wait for may take pages of another model, its assistant
        runner.scheduler.executor.pool.lock.acquire()


def _after_fork(child: bool) -> None:
    for runner in _forking:
        runner.scheduler.executor.pool.lock.release()
        runner.lock.release()
        runner.may_step.set()
        if child:
            runner.forget()
    _forking.clear()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork,
        after_in_parent=lambda: _after_fork(False),
        after_in_child=lambda: _after_fork(True),
    )
