"""The scheduler: many tasks, one executor. It decides whose rows the next step runs.

A task is a text on its way, a beam search, or a text that is scored. Between steps tasks join and leave. A step takes
first a row of each sequence that decodes, then pieces of prompts, as far as its budget of tokens goes, then guesses
of what comes next, if these are few rows and there are pages for them. When the pool
has no page left, the youngest task gives its pages back and runs again later; the same bits come out of that, since
they depend on a sequence's own tokens alone.

No threads here: `runner.py` calls `step` from one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import NamedTuple

from ._native.sampling import Workspace
from .errors import ArgumentError, OutOfMemoryError, StepStopped
from .executor import Executor, Rows
from .kv import PAGE, NoPages, no_room
from .prefix import PrefixCounters
from .sampling import Draw, draw_ahead
from .task import Floats, Task

AHEAD_STEPS, AHEAD_SECONDS = 8, 1 / 4  # most that the engine decodes by itself
WATCHED_SECONDS = 1 / 30  # the same while somebody watches a text come, who doesn't see it come in such portions
DRAFT_ROWS = 12  # most rows of a step with guesses: so many are one stream of weights from memory, more are not


class Planned(NamedTuple):
    """A task's part of a step."""

    task: Task
    rows: list[Rows]
    decoding: bool = False  # they are a row of each of its sequences

    @property
    def n_logits(self) -> int:
        """Rows of logits that it wants."""
        return sum([rows.n_logits for rows in self.rows])


class Scheduler:
    """The tasks that run and those that wait, in the order they came.

    max_batch is how many sequences run at once; one task with more runs alone. step_tokens is how many tokens a step
    takes while a sequence decodes: less keeps its pace, more is faster for long prompts. `step` and all else is for one
    thread at a time; `stop_cancelled` may be called by others.
    """

    def __init__(self, executor: Executor, max_batch: int = 32, step_tokens: int = 128) -> None:
        for name, value in (("max_batch", max_batch), ("step_tokens", step_tokens)):
            if not 1 <= value <= executor.max_rows:
                raise ArgumentError(f"{name}: expected 1 to {executor.max_rows}, got {value}")
        self.executor = executor
        self.max_batch = max_batch
        self.step_tokens = step_tokens
        self.works = [Workspace(executor.vocab_size) for _ in range(executor.threads)]
        self.waiting: deque[Task] = deque()
        self.live: list[Task] = []
        self.stepping: list[Task] = []  # whose rows the engine computes at the moment
        self.n_step = self.n_paused = 0  # since the beginning

    def check(self, task: Task) -> None:
        """Raises `ArgumentError` for a task that could never run."""
        if task.n_page_most > self.executor.pool.capacity:
            raise ArgumentError(
                f"kv_memory: expected room for {task.n_page_most} pages of {PAGE} positions, which this request can "
                f"come to need, got room for {self.executor.pool.capacity}"
            )

    def add(self, task: Task) -> None:
        """Puts a task behind those that wait."""
        self.waiting.append(task)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.waiting or self.live)

    def cancel(self, task: Task, error: Exception | None = None) -> None:
        """Ends a task, wherever it is."""
        task.cancelled = True
        if task in self.live:
            self.live.remove(task)
        elif task in self.waiting:
            self.waiting.remove(task)
        if not task.ended:
            task.end(error)

    def close(self) -> None:
        """Ends all tasks."""
        for task in [*self.live, *self.waiting]:
            self.cancel(task)

    def stop_cancelled(self) -> None:
        """Stops the step that runs if nobody waits for it any more."""
        tasks = self.stepping
        if tasks and all(task.cancelled for task in tasks):
            self.executor.stop()

    def step(self, urgent: Callable[[], bool] = bool) -> None:
        """Runs one step of the executor for those whose turn it is, and hands out what comes of it.

        It runs several where all there is to do is decode, as long as they are short and it isn't `urgent()`.

        What goes wrong with a task ends that task. What goes wrong with the step ends all that were in it.
        """
        try:
            self._admit()
            plan = self._draft(self._make_room(self._plan()))
        except Exception as error:  # nobody's in particular
            self._end_all(error)
            return
        try:
            self.stepping = [part.task for part in plan]
            if plan:
                self._run(plan, urgent)
        except StepStopped:
            pass  # nothing has changed: who isn't cancelled does it again
        except Exception as error:
            for part in plan:
                part.task.end(error)
        finally:
            self.stepping = []
        for task in self.live:
            if task.finished and not task.ended:
                task.end()
        self.live = [task for task in self.live if not task.ended]

    def _end_all(self, error: Exception) -> None:
        """Ends the tasks that run, and the next that waits: one of them can't be gone on with."""
        for task in [*self.live, *list(self.waiting)[:1]]:
            self.cancel(task, error)

    def _admit(self) -> None:
        """Lets tasks in as they came, while there are places in the batch, and pages for what they wait to run."""
        while self.waiting:
            task = self.waiting[0]
            if self.live and sum(one.n_place for one in self.live) + task.n_place > self.max_batch:
                return
            task.start()
            if self.live and -(-task.n_pending // PAGE) + task.n_place > self.executor.pool.n_available:
                task.pause()
                return
            self.live.append(self.waiting.popleft())

    def _plan(self) -> list[Planned]:
        decoding: list[Task] = []
        prompts: list[Task] = []
        for task in self.live:
            (decoding if task.decoding else prompts).append(task)
        plan = []
        n_left = self.executor.max_rows  # as many as there are places in the batch, at least
        for task in decoding:
            rows = task.plan(n_left)
            n_left -= count(rows)
            plan.append(Planned(task, rows, True))
        if decoding:
            n_run = self.executor.max_rows - n_left
            n_left = min(n_left, max(self.step_tokens - n_run, self.step_tokens // 4))
        return plan + [Planned(task, task.plan(n)) for task, n in shares(prompts, n_left)]

    def _draft(self, plan: list[Planned]) -> list[Planned]:
        """Adds what tasks guess, where the step is small; drops a task that fails at it."""
        drafting = [part for part in plan if part.decoding and part.task.drafts]
        if not drafting:
            return plan
        n_row = sum([count(part.rows) for part in plan])
        n_left = min(self.step_tokens, self.executor.max_rows, DRAFT_ROWS) - n_row
        for part in drafting:
            if n_left > 0:
                try:
                    n_left -= part.task.draft(part.rows, n_left, n_row)
                except Exception as error:
                    part.task.end(error)
        return [part for part in plan if not part.task.ended]

    def _make_room(self, plan: list[Planned]) -> list[Planned]:
        """Reserves the pages of a step. Where there are none, the youngest task pauses; the oldest never has to.

        The order is that of the plan: in any, the oldest tasks are left, as many as there are pages for.
        """
        for part in plan:
            while part.task in self.live and not self._reserved(part):
                self._pause(self.live[-1])
        return [part for part in plan if part.task in self.live]

    def _reserved(self, part: Planned) -> bool:
        """Whether there are pages for it; none are refused to the last task that is left, unless it keeps them."""
        alone = len(self.live) == 1
        try:
            for rows in part.rows:
                rows.sequence.reserve(len(rows.token_ids), within=part.task.keeps or not alone)
        except (NoPages, OutOfMemoryError) as error:
            if not alone:
                return False
            self.live.clear()
            part.task.end(no_room(self.executor.pool, 1) if isinstance(error, NoPages) else error)
        return True

    def _pause(self, task: Task) -> None:
        """The task waits again, before all others: those that wait came after it."""
        self.n_paused += 1
        task.pause()
        self.live.remove(task)
        self.waiting.appendleft(task)

    def _run(self, plan: list[Planned], urgent: Callable[[], bool]) -> None:
        rows = [rows for part in plan for rows in part.rows]
        n, draws = self._ahead(plan, rows)
        if not n:
            self.n_step += 1
            self._hand_out(plan, self.executor.step(rows))
            return
        seconds = WATCHED_SECONDS if any(part.task.watched() for part in plan) else AHEAD_SECONDS
        for drawn in self.executor.decode(rows, draws, n, seconds, self.works, urgent):
            self.n_step += 1
            rest = iter(drawn)
            for part in plan:
                attempt(part.task, partial(part.task.accept, list(islice(rest, len(part.rows)))))
            if any(part.task.ended for part in plan):
                return

    def _ahead(self, plan: list[Planned], rows: list[Rows]) -> tuple[int, list[Draw]]:
        """How many steps the engine can make by itself, and how it draws the tokens; 0 if it can't know which come."""
        n, draws = AHEAD_STEPS, []
        for part in plan:
            n_task, its = part.task.draws() if part.decoding else (0, [])
            if not n_task or len(its) != len(part.rows) or count(part.rows) != len(its):
                return 0, []
            n = min(n, n_task)
            draws += its
        try:
            for one in rows:
                one.sequence.reserve(n, within=True)
        except (NoPages, OutOfMemoryError):
            n = 1  # has its page
        return n, draws

    def _hand_out(self, plan: list[Planned], logits: Floats) -> None:
        first = 0
        parts: list[tuple[Planned, Floats]] = []
        for part in plan:
            end = first + part.n_logits
            parts.append((part, logits[first:end]))
            first = end
        if len(logits) > 1:  # or else nothing is there to be drawn side by side
            draw_ahead(self.works, [one for part, its in parts for one in part.task.samplers(part.rows, its)])
        for part, its in parts:
            attempt(part.task, partial(part.task.advance, part.rows, its))


@dataclass(frozen=True)
class Stats:
    """What a scheduler has to do, and how the pool of KV pages is used. Pages have 64 positions."""

    running: int  # requests
    waiting: int
    paused: int  # how often a request gave its pages back for others, since the model was loaded
    steps: int  # since the model was loaded
    kv_pages: int  # the most that requests and the prefix cache have
    kv_pages_used: int  # that sequences hold
    kv_pages_cached: int  # that the prefix cache alone keeps
    kv_page_bytes: int
    prompt_tokens: int  # of all prompts that were looked up in the prefix cache
    reused_tokens: int  # of these, how many it had
    evicted_pages: int  # that it has given up for others


def stats(scheduler: Scheduler) -> Stats:
    """The numbers of this moment."""
    pool = scheduler.executor.pool
    counters = pool.cache.counters if pool.cache else PrefixCounters()
    return Stats(
        running=len(scheduler.live),
        waiting=len(scheduler.waiting),
        paused=scheduler.n_paused,
        steps=scheduler.n_step,
        kv_pages=pool.capacity,
        kv_pages_used=pool.n_used,
        kv_pages_cached=pool.n_cached,
        kv_page_bytes=pool.layout.page_nbytes,
        prompt_tokens=counters.prompt_tokens,
        reused_tokens=counters.reused_tokens,
        evicted_pages=counters.evicted_pages,
    )


def attempt(task: Task, take: Callable[[], None]) -> None:
    """Lets a task take what a step gave it. Whatever a callable of the user raises is that request's."""
    try:
        take()
    except BaseException as error:
        task.end(error)


def count(rows: SequenceOf[Rows]) -> int:
    """Tokens of some rows."""
    return sum([len(one.token_ids) for one in rows])


def shares(tasks: SequenceOf[Task], n: int) -> Iterator[tuple[Task, int]]:
    """How n tokens of a step are shared by prompts, in the order they came: the first takes what it can, but half of
    the budget is for later ones that need no more than that to come to their first token.
    """
    granted = {}
    n_short = n // 2
    for task in tasks[1:]:
        if task.n_pending <= n_short:
            granted[id(task)] = task.n_pending
            n_short -= task.n_pending
            n -= task.n_pending
    for task in tasks:
        share = granted.get(id(task), min(task.n_pending, n))
        if id(task) not in granted:
            n -= share
        if share:
            yield task, share
