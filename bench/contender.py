"""An engine in one variant on its way through a comparison: converted, checked, measured round by round."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench import check
from bench.engines import VARIANTS
from bench.metrics import FIRST, METRICS, PROCESS_METRICS, USE, Metric, short
from bench.remote import Remote
from pyengine.plan import Plan


@dataclass(frozen=True)
class Subject:
    """A checkpoint that is compared on, and where its conversions go."""

    folder: Path
    work: Path
    plan: Plan


# Of one process: seconds from after the imports to the first token, from before them, and with what the conversion
# took; peak bytes, and those after the imports.
PROCESS_SAMPLES = ("load", "load_with_import", "from_checkpoint", "memory", "memory_after_import")


class Trouble(Exception):
    """Why a variant, or one of its metrics, has no figure. `kind` is "skipped" or "error"."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def good(answer: dict[str, Any]) -> dict[str, Any]:
    """An answer that is one; raises Trouble for another."""
    for kind in ("skipped", "error"):
        if kind in answer:
            raise Trouble(kind, answer[kind])
    return answer


@dataclass
class Contender:
    """A variant with its processes (one for each checkpoint) and all that was found out about it."""

    engine: str
    variant: str
    threads: int
    logs: Path
    remotes: dict[Path, Remote] = field(default_factory=dict)
    files: dict[Path, str] = field(default_factory=dict)
    converting: dict[Path, float | None] = field(default_factory=dict)  # seconds; None where nobody knows
    found: dict[str, Any] = field(default_factory=dict)  # what results.json says of it

    def __post_init__(self) -> None:
        width = VARIANTS[self.engine][self.variant]
        self.found |= {"engine": self.engine, "variant": self.variant, "width": width, "status": "ok"}
        self.found |= {"checks": {}, "metrics": {}}  # by checkpoint; by metric

    @property
    def ok(self) -> bool:
        return bool(self.found["status"] == "ok")

    def start(self) -> Remote:
        """A fresh process with the engine imported."""
        remote = Remote(self.engine, self.variant, self.threads, self.logs / f"{self.engine}-{self.variant}.log")
        if "error" in remote.hello or "skipped" in remote.hello:
            remote.close()
        hello = good(remote.hello)
        self.found |= {key: hello[key] for key in ("versions", "settings")}
        return remote

    def loaded(self, subject: Subject) -> Remote:
        """The process that has the checkpoint loaded."""
        if subject.folder not in self.remotes:
            remote = self.start()
            self.remotes[subject.folder] = remote
            good(remote.ask("load", files=self.files[subject.folder], threads=self.threads))
        return self.remotes[subject.folder]

    def close(self, keep: Path | None = None) -> None:
        """Ends its processes, but for the one of a checkpoint to keep."""
        for folder in [*self.remotes]:
            if folder != keep:
                self.remotes.pop(folder).close()

    def prepare(self, subject: Subject, reference: Remote) -> None:
        """Converts, loads and checks; what goes wrong becomes its status."""
        try:
            converter = self.start()  # in a process of its own: converters take memory and may keep threads
            answer = converter.ask("convert", checkpoint=str(subject.folder), work=str(subject.work / self.engine))
            converter.close()
            self.files[subject.folder] = good(answer)["files"]
            self.converting[subject.folder] = answer["seconds"]
            agreement = self.agreement(self.loaded(subject), subject.plan, reference)
            self.found["checks"][subject.folder.name] = agreement
            problem = check.verdict(self.found["width"], agreement)
            if problem:
                raise Trouble("error", problem)
        except Trouble as trouble:
            self.found |= {"status": {"error": "failed"}.get(trouble.kind, trouble.kind), "reason": str(trouble)}
            self.close()

    def agreement(self, remote: Remote, plan: Plan, reference: Remote) -> dict[str, Any]:
        """How its logits and its continuations, alone and as a batch, look to our float32."""
        text, prompts = check.prompts(plan.vocab_size, plan.max_seq_len)
        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/logits.npy"
            good(reference.ask("save_logits", text=text, path=path))
            logits = good(remote.ask("compare_logits", text=text, path=path))["logits"]
        regrets, equal = [], []
        for some in (prompts[:1], prompts):
            tokens = good(remote.ask("greedy", prompts=some, n_new=check.NEW_TOKENS))["tokens"]
            expected = good(reference.ask("greedy", prompts=some, n_new=check.NEW_TOKENS))["tokens"]
            regrets.append(good(reference.ask("judge", prompts=some, tokens=tokens))["regret"])
            equal += [mine == theirs for mine, theirs in zip(tokens, expected, strict=True)]
        return {"logits": logits, "regret": max(regrets), "equal_texts": sum(equal), "texts": len(equal)}

    def warm_up(self, metrics: Iterable[str], subjects: list[Subject]) -> None:
        """Runs what will be measured once; what can't run is told when it is measured."""
        for name in METRICS:
            if name in metrics:
                with contextlib.suppress(Trouble):
                    self._warm(name, subjects)

    def measure(self, metrics: Iterable[str], subjects: list[Subject], seed: int) -> None:
        """A sample of each metric; None where there is none, with the reason."""
        for name in METRICS:
            if name in metrics:
                self._record((name,), lambda name=name: (self._rate(name, subjects, seed),))
        if set(metrics) & set(PROCESS_METRICS):
            self._record(PROCESS_SAMPLES, lambda: self._fresh(subjects[0]))

    def _record(self, names: Sequence[str], sample: Callable[[], Sequence[float | None]]) -> None:
        """Appends to the samples of metrics what `sample` returns; None for each where it can't."""
        try:
            values: Sequence[float | None] = sample()
        except Trouble as trouble:
            values = [None] * len(names)
            for name in names:
                self._metric(name)[trouble.kind] = str(trouble)
        for name, value in zip(names, values, strict=True):
            self._metric(name)["samples"].append(value)

    def _metric(self, name: str) -> dict[str, Any]:
        """What is known of a metric so far."""
        return self.found["metrics"].setdefault(name, {"samples": []})

    def _rate(self, name: str, subjects: list[Subject], seed: int) -> float:
        """Tokens a second."""
        remote, subject = self._warm(name, subjects)
        return self._run(remote, METRICS[name], subject, seed)["rate"]

    def _warm(self, name: str, subjects: list[Subject]) -> tuple[Remote, Subject]:
        """The process and the checkpoint of a metric, which has run there once."""
        subject = fitting(METRICS[name], subjects)
        remote = self.loaded(subject)
        if name not in remote.warm:
            self._run(remote, METRICS[name], subject, 0)
            remote.warm.add(name)
        return remote, subject

    def _run(self, remote: Remote, metric: Metric, subject: Subject, seed: int) -> dict[str, Any]:
        return good(remote.ask("run", metric=asdict(metric), vocab_size=subject.plan.vocab_size, seed=seed))

    def _fresh(self, subject: Subject) -> Sequence[float | None]:
        """PROCESS_SAMPLES of a new process, its files read just before: the system's cache may have given some up."""
        read_through(Path(self.files[subject.folder]))
        remote = self.start()
        try:
            load = good(remote.ask("load", files=self.files[subject.folder], threads=self.threads))["seconds"]
            load += self._run(remote, FIRST, subject, 1)["seconds"][0]
            self._run(remote, short(USE, subject.plan.max_seq_len), subject, 1)
            memory = good(remote.ask("memory"))["bytes"]
        finally:
            remote.close()
        with_import = load + remote.hello["import_seconds"]
        converting = self.converting[subject.folder]
        if converting is None:
            self._metric("from_checkpoint")["skipped"] = "nobody knows how long the conversion took"
        whole = None if converting is None else converting + with_import
        return load, with_import, whole, memory, remote.hello["bytes"]


def read_through(path: Path) -> None:
    """Reads a file, or all of a folder."""
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.is_file():
            with file.open("rb", buffering=0) as stream:
                while stream.read(1 << 20):
                    pass


def fitting(metric: Metric, subjects: list[Subject]) -> Subject:
    """The first checkpoint whose context is long enough; raises Trouble if there is none."""
    for subject in subjects:
        if metric.positions <= subject.plan.max_seq_len:
            return subject
    most = max(subject.plan.max_seq_len for subject in subjects)
    raise Trouble("skipped", f"needs {metric.positions} positions, the context has {most}")
