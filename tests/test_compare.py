"""bench.compare without other engines: what the report says of given samples, and a worker with our own engine."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import write_checkpoint

pytest.importorskip("bench.report", reason="needs the checkout on the path: python -m pytest")

from bench import check, compare, report
from bench.contender import PROCESS_SAMPLES, Contender, Subject, Trouble, fitting
from bench.conversions import once, seconds_of
from bench.conversions.checkpoint import tensors
from bench.metrics import METRICS, Metric
from bench.remote import Remote
from bench.roofline import roofline
from pyengine import loading
from pyengine.checkpoint import Checkpoint
from pyengine.cost import cost
from pyengine.weights import as_stored, to_float32

if sys.platform == "win32" or getattr(sys.flags, "safe_path", False):
    pytest.skip("a worker needs POSIX, and wouldn't find the checkout on a safe path", allow_module_level=True)


def variant(engine: str, name: str, width: str, **samples: list[float | None]) -> dict[str, Any]:
    """What results.json says of a variant."""
    checks = {"tiny": {"logits": None, "regret": 0.0, "equal_texts": 9, "texts": 9}}
    measured = {metric: {"samples": values} for metric, values in samples.items()}
    found = {"engine": engine, "variant": name, "width": width, "status": "ok"}
    return found | {"checks": checks, "metrics": measured}


@pytest.fixture
def results() -> dict[str, Any]:
    """Three rounds; in the second one the machine is half as fast."""
    limits = {"bandwidth": 40e9, "peak_float32": 400e9, "peak_int8": 1600e9}
    lines = {"float32": {"decode": 100.0}, "bfloat16": {"decode": None}, "int8": {"decode": 400.0}, "int4": {}}
    slow = {width: {"decode": line["decode"] and line["decode"] / 2} if line else {} for width, line in lines.items()}
    return {
        "machine": {"cpu": "a CPU", "cpus": 2, "system": "a system", "python": "3.10", "date": "today"},
        "model": {"name": "tiny", "type": "gpt2", "parameters": 1e6},
        "threads": 2,
        "metrics": {"decode": "decode", "load": "load"},
        "limits": [limits] * 3,
        "rooflines": [lines, slow, lines],
        "variants": [
            variant("pyengine", "float32", "float32", decode=[90.0, 45.0, 80.0], load=[2.0, 4.0, 2.0]),
            variant("pyengine", "int8", "int8", decode=[300.0, 150.0, 310.0], load=[1.0, 2.0, 1.0]),
            variant("pyengine", "int8-kv-int8", "int8", decode=[1.0, 1.0, 1.0]),
            variant("other", "F32", "float32", decode=[60.0, 30.0, 80.0], load=[3.0, 6.0, 1.0]),
            variant("other", "Q4", "int4", decode=[200.0, None, 155.0], load=[1.0, 1.0, 1.0]),
            variant("broken", "F32", "float32") | {"status": "failed", "reason": "no"},
        ],
    }


def test_report_has_medians_and_ratios_within_rounds(results: dict[str, Any]) -> None:
    ours, int8, _, other, int4 = report.rows(results, "decode")
    assert (ours.median, ours.least, ours.most, ours.ratio) == (80.0, 45.0, 90.0, None)
    assert ours.share == pytest.approx(0.9)  # of each round's own limit: 0.9, 0.9, 0.8
    assert int8.share == pytest.approx(0.75)
    assert (other.median, other.ratio, other.ratio_to) == (60.0, pytest.approx(1.5), "float32")  # 1.5, 1.5, 1
    assert (int4.ratio, int4.ratio_to, int4.share) == (pytest.approx(1.75), "int8", None)  # 1.5 and 2; no int4 of ours


def test_less_is_better_for_loading(results: dict[str, Any]) -> None:
    _, _, other, int4 = report.rows(results, "load")
    assert other.ratio == pytest.approx(1.5)  # 1.5, 1.5, 0.5
    assert int4.ratio == pytest.approx(1.0)


def test_report_is_written(results: dict[str, Any], tmp_path: Path) -> None:
    report.write(results, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    text = (tmp_path / "results.md").read_text()
    assert "| other F32 | 60 (30\N{EN DASH}80) | 1.50 \N{MULTIPLICATION SIGN} | 60% |" in text
    assert "1.75 \N{MULTIPLICATION SIGN} (int8)" in text
    assert "broken F32: failed: no" in text


def test_a_check_that_can_fail() -> None:
    rng = np.random.default_rng(0)
    expected = rng.standard_normal((20, 1000)).astype(np.float32)
    noise = rng.standard_normal(expected.shape).astype(np.float32)
    good = check.difference(expected + np.float32(0.02) * noise + 3, expected)  # + 3 changes no probability
    assert good["relative"] == pytest.approx(0.02, rel=0.1)
    assert good["same_top"] > 0.8 and 0 < good["divergence"] < 1e-3
    chosen = expected.argmax(-1).tolist()[:-1]
    assert check.regret(expected, chosen[-8:]) == 0
    assert check.regret(expected, rng.integers(0, 1000, 8).tolist()) == pytest.approx(1, abs=0.3)
    assert check.verdict("int8", {"logits": good, "regret": 0.0}) is None
    assert "logits" in str(check.verdict("float32", {"logits": good, "regret": 0.0}))
    assert "logits" in str(check.verdict("int4", {"logits": check.difference(noise, expected), "regret": 0.0}))
    assert "regret" in str(check.verdict("int4", {"logits": None, "regret": 0.2}))
    assert check.verdict("int4", {"logits": None, "regret": float("nan")}) is not None


def test_roofline_is_the_slower_of_reading_and_multiplying(tmp_path: Path) -> None:
    plan = loading.plan_of(write_checkpoint(tmp_path))
    counted = cost(plan, "float32", "float32")
    limits = {"bandwidth": counted.decode_bytes * 100.0, "peak_float32": 1e12, "peak_int8": 1e12}
    one, many = Metric("", 1, 8, 4), Metric("", 8, 8, 4)
    assert roofline(plan, "float32", one, limits) == pytest.approx(100)
    assert roofline(plan, "float32", many, limits) == pytest.approx(800)
    limits["peak_float32"] = 400.0 * (counted.block_flops + counted.picked_flops)
    assert roofline(plan, "float32", many, limits) == pytest.approx(400)
    assert roofline(plan, "bfloat16", one, limits) is None  # its peak wasn't measured
    prompt = roofline(plan, "float32", Metric("", 1, 8, 0), limits)
    assert prompt == pytest.approx(limits["peak_float32"] / counted.block_flops)


def test_a_metric_needs_a_context_that_is_long_enough(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    subject = Subject(folder, tmp_path, loading.plan_of(folder))
    assert fitting(Metric("", 1, 60, 4), [subject]) is subject
    with pytest.raises(Trouble, match="needs 65 positions, the context has 64"):
        fitting(Metric("", 1, 60, 5), [subject])
    assert "decode" not in compare.rooflines({"bandwidth": 1.0}, [subject])["float32"]  # 112 positions


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_other_engines_are_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setattr("pyengine.weights.SLAB_BYTES", 5000)  # several pieces of each matrix
    folder = write_checkpoint(tmp_path, dtype=dtype)
    found = dict(tensors(folder))
    with Checkpoint.open(folder) as checkpoint:
        for name, values in found.items():
            tensor = checkpoint.tensors[name]
            raw = np.empty(tensor.nbytes, np.uint8)
            checkpoint.read_into(name, raw)
            expected = to_float32(as_stored(raw, tensor.dtype)).reshape(tensor.shape)
            transposed = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))  # stored as [in, out]
            np.testing.assert_array_equal(values, expected.T if transposed else expected)
    assert len(found) == len(checkpoint.tensors)


def test_a_conversion_is_made_and_timed_once(tmp_path: Path) -> None:
    def make(path: Path) -> None:
        time.sleep(0.01)
        path.write_text("made")

    def fail(path: Path) -> None:
        path.write_text("half of it")
        raise ValueError

    exact = once(tmp_path / "files" / "exact", make)
    rounded = once(tmp_path / "files" / "rounded", make, exact)
    first, both = seconds_of(exact), seconds_of(rounded)
    assert first is not None and both is not None and 0.01 <= first < first + 0.01 <= both
    assert once(exact, fail) == exact and seconds_of(exact) == first  # it is there
    with pytest.raises(ValueError):
        once(tmp_path / "broken", fail)
    assert not (tmp_path / "broken").exists() and seconds_of(tmp_path / "broken") is None


def test_a_worker_imports_nothing_of_ours_for_others() -> None:
    # What a worker has imported before its engine isn't counted as the engine's imports.
    code = "import bench.worker, sys; sys.exit(any(name.split('.')[0] == 'pyengine' for name in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_stands_still_unless_asked(tmp_path: Path) -> None:
    remote = Remote("pyengine", "float32", 1, tmp_path / "log")
    status = Path(f"/proc/{remote.process.pid}/stat")
    try:
        assert remote.ask("memory")["bytes"] > 1e6
        for _ in range(1000):  # the system takes a moment
            if status.read_text().rpartition(")")[2].split()[0] == "T":
                break
            time.sleep(0.001)
        else:
            pytest.fail("it isn't stopped")
    finally:
        remote.close()


def test_worker_measures_and_checks_our_own_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path / "tiny")
    subject = Subject(folder, tmp_path / "work", loading.plan_of(folder))
    reference = Remote("pyengine", "float32", 1, tmp_path / "reference.log")
    assert reference.ask("load", files=str(folder), threads=1)["seconds"] > 0
    contender = Contender("pyengine", "int8", 1, tmp_path)
    try:
        contender.prepare(subject, reference)
        assert contender.ok, contender.found
        agreement = contender.found["checks"]["tiny"]
        assert 0 < agreement["logits"]["relative"] < 0.1
        contender.measure(["decode_900"], [subject], 1)
        with monkeypatch.context() as patched:
            patched.setitem(METRICS, "short", Metric("short", 3, 8, 4))
            contender.measure(["short", "memory"], [subject], 1)
        assert "nothing there" in reference.ask("load", files=str(tmp_path / "no"), threads=1)["error"]
    finally:
        reference.close()
        contender.close()
    decode = contender.found["metrics"]["decode_900"]
    assert decode["samples"] == [None] and "needs 932 positions" in decode["skipped"]
    (rate,) = contender.found["metrics"]["short"]["samples"]
    assert 10 < rate < 1e7
    samples = {name: contender.found["metrics"][name]["samples"] for name in PROCESS_SAMPLES}
    assert 0 < samples["load"][0] < samples["load_with_import"][0] == samples["from_checkpoint"][0]
    assert 1e6 < samples["memory_after_import"][0] <= samples["memory"][0]
