"""Speculation: guessing the tokens that come next, so that one step can run them all.

A guess is right if the sampler, given the model's own logits, draws that very token; only then does the text go on with
it. So guesses change when tokens come, never which (Leviathan et al. 2023; drawing by the position's own random number
makes it exact for samples too). What they cost is rows: `worth` weighs that against how often guesses were right.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .errors import NonFiniteError, OutOfMemoryError, StepStopped
from .executor import Executor, Rows
from .kv import NoPages
from .sampling import Sampler

MARGIN = 1.05  # how much faster it has to be expected: what isn't counted, and chance
MEMORY = 32  # guesses that what is known of them goes back to
BELIEF = 4  # guesses that what is believed before any weighs as much as

Ids = NDArray[np.int32]
Floats = NDArray[np.float32]


class Proposer(ABC):
    """Guesses for one text. Only the thread that steps calls it."""

    awake_at = 0  # so many generated tokens there are to be before it is asked again

    @abstractmethod
    def propose(self, generated: array[int], n: int, n_row: int = 1) -> list[int]:
        """At most n tokens that may come after the prompt and what was generated of the text; none if it won't pay.

        n_row is how many rows the step has without any guesses.
        """

    @abstractmethod
    def observe(self, n_proposed: int, n_accepted: int) -> None:
        """Is told how many of those that it proposed last were right, in a row from the first."""

    @abstractmethod
    def close(self) -> None:
        """Gives back what others may need; it can go on."""


@dataclass
class Frequency:
    """How often something happens, by what was believed at first and has been seen lately."""

    mean: float
    memory: int  # how much of what was seen counts
    n_seen: int = BELIEF

    def see(self, happened: bool) -> None:
        """It did happen this time, or didn't."""
        self.mean += (happened - self.mean) / self.n_seen
        self.n_seen = min(self.n_seen + 1, self.memory)


class Experience:
    """What texts alike know of an assistant: how often it is right, and what trying it may still cost them.

    The credit is in steps of one row. Their tokens and right guesses are its income; what the assistant reads and
    guesses is paid from it. Without credit it reads nothing, be it to begin a text or to go on after a pause, and
    guesses only what a text was read for, as long as it is right. So where guesses never help they take SHARE of the
    time, and once the first credit and a last reading.
    """

    SHARE = 0.01
    CREDIT = 16.0, 64.0  # at first, and at most: what paid once is no reason to lose much later
    HOPE = 0.8  # how often a good assistant is right; believed at first
    MEMORY = 256  # guesses that what is known of them goes back to

    def __init__(self) -> None:
        self.credit = self.CREDIT[0]
        self.right = Frequency(self.HOPE, self.MEMORY)

    def add(self, steps: float) -> None:
        """An income, or what was spent."""
        self.credit = min(self.credit + steps, self.CREDIT[1])


@dataclass(frozen=True)
class Speculation:
    """How a model's texts are guessed ahead; costs are in steps of one row."""

    num_tokens: int  # most guesses at a time
    row_cost: float  # of one more row in a step
    visit_cost: float = 0.0  # of a step that Python has to be asked about, beside those that the engine makes by itself
    assistant: Executor | None = None  # that of the model which guesses; without one the text itself is looked up
    assistant_cost: float = 0.0  # of a step of the assistant, between steps of the model
    assistant_row_cost: float = 0.0  # of one more row in it
    experience: Experience = field(default_factory=Experience)

    def proposer(self, prompt_ids: Ids, sampler: Sampler) -> Proposer:
        """What guesses for a text that `sampler` draws."""
        if self.assistant is None:
            return PromptLookup(prompt_ids, self.num_tokens, self.row_cost, self.visit_cost)
        return DraftModel(self, self.assistant, prompt_ids, sampler)


def worth(hits: SequenceOf[float], at: int, cost: float, n: int, visit: float = 0.0) -> tuple[int, float]:
    """How many guesses to make, at most n: as long as one more brings more tokens for the time; and how many times as
    many as without that is.

    hits[at + i] is how probably guess i is right if those before it are; the last one stands for all that follow. A
    step of k guesses costs 1 + visit + k cost, and brings 1 + hits[at] + hits[at] hits[at + 1] + … tokens.
    """
    best, n_best, expected, reached, last = MARGIN, 0, 1.0, 1.0, len(hits) - 1
    for k in range(1, n + 1):
        reached *= hits[min(at + k - 1, last)]
        expected += reached
        rate = expected / (1 + visit + k * cost)
        if rate > best:
            best, n_best = rate, k
        elif reached <= cost * rate:  # nor will one more bring enough
            break
    return n_best, best


def shared(cost: float, row_cost: float, n_row: int) -> float:
    """The cost of a guess where the step has n_row rows anyway, for as many texts, which all wait for it: in steps of
    such n_row rows, and n_row times, since what it brings is one token beside n_row.
    """
    return n_row * cost / (1 + (n_row - 1) * row_cost)


class PromptLookup(Proposer):
    """Guesses that the text goes on as it did the last time that it had the same two or three tokens (Saxena 2023).

    It follows what came then, token by token, as long as the text does the same: so it knows of every token whether it
    would have guessed it, also while it proposes none. How often, by the length of what has been the same, is what it
    knows of the next.
    """

    PAIR, TRIPLE, LONGEST = 2, 3, 9  # tokens that were the same
    MOST_REST = 16  # tokens that come before it looks again, while it has nothing to say

    def __init__(self, prompt_ids: Ids, num_tokens: int, row_cost: float, visit_cost: float = 0.0) -> None:
        self.num_tokens, self.row_cost, self.visit_cost = num_tokens, row_cost, visit_cost
        self.n_prompt = len(prompt_ids)
        self.text: list[int] = prompt_ids.tolist()
        self.hits = [0.0, 0.0, 0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.8, 0.9]  # by that length; believed at first
        self.n_seen = [BELIEF] * len(self.hits)
        self.source = 0  # where in the text the next token is expected to be found; 0: nowhere
        self.n_same = 0  # tokens before it that are the last ones of the text too
        self.rest = 1  # tokens until it looks again, next time that it has nothing to say
        wide = prompt_ids.astype(np.int64)
        pairs, ends = wide[:-1] << 20 | wide[1:], range(2, self.n_prompt + 1)
        triples = (wide[:-2] << 40 | pairs[1:]) + (1 << 62)
        # Two or three tokens → where they ended last. Ids that don't fit 20 bits could only make for a wrong guess.
        self.last = dict(zip(pairs.tolist(), ends, strict=True))
        self.last.update(zip(triples.tolist(), ends[1:], strict=True))

    def propose(self, generated: array[int], n: int, n_row: int = 1) -> list[int]:
        for token_id in generated[len(self.text) - self.n_prompt :]:
            self._append(token_id)
        cost = shared(self.row_cost, self.row_cost, n_row)
        n = min(n, self.num_tokens)
        n = worth(self.hits, self.n_same, cost, n, self.visit_cost)[0] if self.source else 0
        if n == 0:  # to ask it at each step would cost a small model more than it brings
            self.awake_at = len(generated) + self.rest
            self.rest = min(2 * self.rest, self.MOST_REST)
            return []
        self.rest = 1
        guesses = self.text[self.source : self.source + n]
        period = len(self.text) - self.source
        for i in range(len(guesses), n):  # what it follows has come to the text's end: it goes round
            guesses.append(guesses[i - period])
        return guesses

    def observe(self, n_proposed: int, n_accepted: int) -> None:
        pass  # it knows from the text

    def close(self) -> None:
        pass  # it has but the text

    def _append(self, token_id: int) -> None:
        text = self.text
        if self.source:
            right = text[self.source] == token_id
            n = min(self.n_same, self.LONGEST)
            self.hits[n] += (right - self.hits[n]) / self.n_seen[n]
            if self.n_seen[n] < MEMORY:
                self.n_seen[n] += 1
            self.source = self.source + 1 if right else 0
            self.n_same += 1
        text.append(token_id)
        if len(text) < self.TRIPLE:
            return
        pair = text[-2] << 20 | token_id
        triple = (text[-3] << 40 | pair) + (1 << 62)
        if not self.source:
            self.source, self.n_same = self.last.get(triple, 0), self.TRIPLE
            if not self.source:
                self.source, self.n_same = self.last.get(pair, 0), self.PAIR
        self.last[pair] = self.last[triple] = len(text)


class DraftModel(Proposer):
    """Guesses what another model would say: tokens that the sampler draws from its logits by the same random numbers.

    The model's executor runs here, in the thread that steps. It begins to read where it may be hoped that what is left
    of the text will pay for that. While its guesses don't pay it tries again after pauses that grow. To read it needs
    credit, which is spent for all of a reading at once.
    """

    CHUNK = 128  # tokens of the text that it reads at a time
    PROBE = 2  # most guesses of a try
    PAUSE = 32, 1024  # tokens of the text: the first pause, the longest

    def __init__(self, speculation: Speculation, executor: Executor, prompt_ids: Ids, sampler: Sampler) -> None:
        self.speculation, self.executor, self.sampler = speculation, executor, sampler
        self.n_prompt = len(prompt_ids)
        self.text = array("i", prompt_ids.tolist())
        self.sequence = executor.new_sequence()
        self.n_certain = 0  # positions of the sequence that are known to be the text's
        self.n_charged = 0  # tokens of the text that it has paid for reading
        self.trusted = True  # whether its last guesses helped, or it hasn't made any since it began to read
        self.right = Frequency(speculation.experience.right.mean, MEMORY)  # how often a guess is
        self.pause = self.PAUSE[0]

    def propose(self, generated: array[int], n: int, n_row: int = 1) -> list[int]:
        how, experience = self.speculation, self.speculation.experience
        new = generated[len(self.text) - self.n_prompt :]
        self.text.extend(new)
        experience.add(experience.SHARE * len(new))
        n = min(n, how.num_tokens, self.executor.max_seq_len + 1 - len(self.text))  # the last guess doesn't run
        if n <= 0:
            return []
        try:
            pending = self._pending()
            n_read = max(len(self.text) - max(self.n_charged, self.n_certain) - 2, 0)  # two run with the first guess
            reading, at_first = (self._reading(n, n_row) for n in (n_read, self.n_prompt))
            cost = shared(how.row_cost + how.assistant_cost, how.row_cost, n_row)
            n_guess = self._paying(self.right.mean, n, cost, reading)
            believed = n_guess > 0
            if not believed:
                n_guess = min(self._paying(experience.HOPE, n, cost, reading), self.PROBE)
            if experience.credit <= max(reading - at_first, 0):  # what is overdrawn is the prompt's reading at most
                n_guess = min(n_guess, self.PROBE) if self.trusted and self.n_charged and not n_read else 0
            if not n_guess:
                self._rest(len(generated))
                return []
            experience.add(-reading)
            self.n_charged = len(self.text)
            if len(pending) > self.CHUNK:
                self._step(pending[: self.CHUNK], 0, 0)
                return []
            if believed:
                self.pause = self.PAUSE[0]
            else:
                self._rest(len(generated))
            experience.add(-n_guess * cost)
            return self._guess(pending, n_guess)
        except (NoPages, OutOfMemoryError, NonFiniteError, StepStopped):
            self.close()
            return []

    def _reading(self, n: int, n_row: int) -> float:
        """What it costs to read n tokens."""
        how = self.speculation
        return shared(n * how.assistant_row_cost + n // self.CHUNK * how.assistant_cost, how.row_cost, n_row)

    def _paying(self, right: float, n: int, cost: float, reading: float) -> int:
        """How many guesses to make, at most n, if they are right so often; none if the text's rest won't pay for what
        is to be read first.
        """
        n_guess, pace = worth([right], 0, cost, n)
        n_left = self.sampler.params.max_new_tokens + self.n_prompt - len(self.text)
        n_left = min(n_left, self.executor.max_seq_len + 1 - len(self.text))
        return n_guess if n_left * (1 - 1 / pace) > reading else 0

    def _rest(self, n_generated: int) -> None:
        self.right.n_seen = BELIEF  # what it knows gets old
        self.awake_at = n_generated + self.pause
        self.pause = min(2 * self.pause, self.PAUSE[1])

    def _guess(self, pending: Ids, n: int) -> list[int]:
        guesses = array("i")
        while len(guesses) < n:
            [logits] = self._step(pending, 1, len(guesses))
            guesses.append(self.sampler.choose(logits, guesses))
            pending = np.array(guesses[-1:], np.int32)
        return guesses.tolist()

    def _step(self, token_ids: Ids, n_logits: int, n_draft: int) -> Floats:
        self.sequence.reserve(len(token_ids), within=True)
        return self.executor.step([Rows(self.sequence, token_ids, n_logits, n_draft)])

    def _pending(self) -> Ids:
        """Forgets what it had guessed wrongly; the tokens of the text that aren't in its sequence, at least one."""
        text, sequence = self.text, self.sequence
        if sequence.length == 0:
            self.n_certain = sequence.reuse(np.array(text, np.int32))
        n = self.n_certain
        while n < min(sequence.length, len(text) - 1) and sequence.token_ids[n] == text[n]:
            n += 1
        sequence.settle(n)
        self.n_certain = n
        return np.array(text[n:], np.int32)

    def observe(self, n_proposed: int, n_accepted: int) -> None:
        self.speculation.experience.add(n_accepted)
        self.trusted = n_accepted > 0
        for i in range(min(n_accepted + 1, n_proposed)):
            for right in (self.right, self.speculation.experience.right):
                right.see(i < n_accepted)

    def close(self) -> None:
        self.sequence.close()
        self.n_certain = self.n_charged = 0
        self.trusted = True
