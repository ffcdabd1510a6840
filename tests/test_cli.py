"""The command line as a process: what it writes where, and its exit codes."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import write_checkpoint
from command import COMMAND, environment, run, the_line

import pyengine
from pyengine.arguments import EXAMPLES, parser
from pyengine.cli import main

GREEDY = ("--temperature", "0", "--threads", "2", "--max-new-tokens", "12")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs a command that can't be done, in this process, which is quicker; returns the one line that it says."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run_here(*arguments: str, stdin: bytes = b"") -> str:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = main(list(arguments))
        out, err = capsys.readouterr()
        assert (code, out) == (1, "")
        return the_line(err)

    return run_here


@pytest.fixture(scope="module")
def expected() -> str:
    """What the API says after "Once upon a time"."""
    model = pyengine.load("demo", threads=2)
    return model.generate("Once upon a time", max_new_tokens=12, temperature=0).text


def test_generate_writes_the_text_alone(expected: str) -> None:
    assert run("generate", "Once upon a time", *GREEDY) == (0, f"Once upon a time{expected}\n", "")
    assert run("generate", "Once upon a time", *GREEDY, "--no-prompt") == (0, f"{expected}\n", "")


def test_generate_reads_stdin(expected: str) -> None:
    assert run("generate", "-", *GREEDY, stdin=b"Once upon a time\n") == (0, f"Once upon a time{expected}\n", "")


def test_generate_stop(expected: str) -> None:
    word = expected.split()[2]
    before = expected[: expected.index(word)]
    code, out, _ = run("generate", "Once upon a time", *GREEDY, "--no-prompt", "--stop", "zebra", "--stop", word)
    assert (code, out) == (0, f"{before}\n")


def test_generate_stats(expected: str) -> None:
    code, out, err = run("generate", "Once upon a time", *GREEDY, "--stats", PYENGINE_ISA="portable")
    assert (code, out) == (0, f"Once upon a time{expected}\n")
    numbers = (
        r"prompt of \d+ tokens, first token after \d+\.\d+ s; 12 tokens, [\d,]+\.\d tokens/s; loaded in \d+\.\d+ s"
    )
    assert re.fullmatch(rf"{numbers}; int8, KV bfloat16, 2 threads, portable\n", err)


def test_generate_options_arrive() -> None:
    model = pyengine.load("demo", dtype="float32", threads=1)
    drawn = model.generate("Once", max_new_tokens=9, temperature=0.7, top_k=40, top_p=0.9, min_p=0.01, seed=3)
    options = (
        "--max-new-tokens 9 --temperature 0.7 --top-k 40 --top-p 0.9 --min-p 0.01 --seed 3 --dtype float32 --no-prompt"
    )
    assert run("generate", "Once", *options.split()) == (0, f"{drawn.text}\n", "")

    penalties = {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": -0.2}
    drawn = model.generate("Once", max_new_tokens=9, temperature=0.8, seed=0, ignore_eos=True, **penalties)
    options = "--max-new-tokens 9 --repetition-penalty 1.3 --presence-penalty .5 --frequency-penalty -.2 --seed 0"
    assert run("generate", "Once", *options.split(), "--ignore-eos", "--dtype", "float32") == (
        0,
        f"Once{drawn.text}\n",
        "",
    )

    beams = model.generate("Once", max_new_tokens=9, num_beams=3, length_penalty=0.5)
    options = "--max-new-tokens 9 --num-beams 3 --length-penalty 0.5 --dtype float32 --no-prompt --stats"
    code, out, err = run("generate", "Once", *options.split(), "--kv-dtype", "float32")
    assert (code, out) == (0, f"{beams.text}\n")
    assert "9 tokens" in err and "; float32, KV float32, " in err
    options = {"num_beams": 4, "max_new_tokens": 9}
    groups = model.generate("Once", **options, num_beam_groups=2, diversity_penalty=0.5)
    command = ["generate", "Once", "--dtype", "float32", "--no-prompt", "--max-new-tokens", "9", "--num-beams", "4"]
    assert run(*command, "--num-beam-groups", "2", "--diversity-penalty", ".5") == (0, f"{groups.text}\n", "")
    sampled = model.generate("Once", **options, do_sample=True, top_p=0.9, seed=3)
    assert run(*command, "--do-sample", "--top-p", ".9", "--seed", "3") == (0, f"{sampled.text}\n", "")
    greedy = model.generate("Once", max_new_tokens=9, do_sample=False)
    assert run(*command, "--num-beams", "1", "--no-do-sample") == (0, f"{greedy.text}\n", "")
    assert "; int8, KV bfloat16, " in run("generate", "Once", "--kv-dtype", "bfloat16", "--stats", "--no-prompt")[2]


def test_generate_constrained(tmp_path: Path) -> None:
    pytest.importorskip("llguidance", reason="constraints need llguidance: the extra `constrained`")
    model = pyengine.load("demo", dtype="float32", threads=1)
    schema = '{"type": "object", "properties": {"a": {"enum": [1, 2]}}, "additionalProperties": false}'
    grammar = 'start: " " ("yes" | "no") "!"{1,3}'
    (tmp_path / "schema.json").write_text(schema)
    (tmp_path / "grammar.lark").write_text(grammar)
    for option, given, arguments in (
        ("--json-schema", schema, {"json_schema": schema}),
        ("--json-schema", str(tmp_path / "schema.json"), {"json_schema": schema}),
        ("--regex", " 1[0-9]{3}", {"regex": " 1[0-9]{3}"}),
        ("--grammar", str(tmp_path / "grammar.lark"), {"grammar": grammar}),
    ):
        expected = model.generate("Once", temperature=0.8, seed=3, **arguments).text
        options = ("--seed", "3", "--no-prompt", "--dtype", "float32", option, given)
        assert run("generate", "Once", *options) == (0, f"{expected}\n", "")


def test_generate_guesses_ahead(tmp_path: Path) -> None:
    model = pyengine.load("demo", dtype="float32", threads=1)
    prompt = "one two three four five six seven. " * 4
    plain = model.generate(prompt, max_new_tokens=90, temperature=0)
    options = ["--max-new-tokens", "90", "--temperature", "0", "--no-prompt", "--dtype", "float32", "--stats"]
    code, out, err = run("generate", prompt, *options, "--prompt-lookup-num-tokens", "8")
    assert (code, out) == (0, f"{plain.text}\n")
    assert re.search(r"tokens/s, \d+ of \d+ guesses right; loaded", err)
    code, out, _ = run("generate", prompt, *options, "--assistant-model", "demo")
    assert (code, out) == (0, f"{plain.text}\n")
    code, out, err = run("generate", prompt, "--num-beams", "2", "--prompt-lookup-num-tokens", "8")
    assert (code, out) == (1, "") and "prompt_lookup_num_tokens: expected None" in err
    code, out, err = run("generate", prompt, "--assistant-model", str(tmp_path / "none"))
    assert (code, out) == (1, "") and "none" in err


def test_help_has_examples() -> None:
    for command in ((), ("generate",), ("batch",), ("bench",), ("info",), ("perplexity",)):
        code, out, err = run(*command, "--help")
        assert (code, err) == (0, "")
        assert f"\nexamples:\n  pyengine {command[0] if command else ''}" in out
    assert run("--version") == (0, f"pyengine {pyengine.__version__}\n", "")


def test_the_examples_are_understood() -> None:
    lines = [line.strip() for text in EXAMPLES.values() for line in text.splitlines() if "pyengine" in line]
    assert len(lines) >= 8
    for line in lines:
        arguments = re.findall(r'"[^"]*"|\S+', line.split("pyengine ", 1)[1].split(" > ")[0])
        if "--help" not in arguments:
            parser().parse_args([argument.strip('"') for argument in arguments])


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("frobnicate",),
        ("generate",),
        ("generate", "a", "b"),
        ("generate", "a", "--max-new-tokens", "many"),
        ("generate", "a", "--temperature", "warm"),
        ("generate", "a", "--threads", "2.5"),
        ("generate", "a", "--colour"),
        ("perplexity",),
        ("bench", "--rounds", ""),
    ],
)
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("usage: pyengine")
    assert "Traceback" not in err


REFUSED = {
    "folder": (("--model", "/nonexistent/model"), "/nonexistent/model: expected a checkpoint's folder, got nothing"),
    "model id": (("--model", "no-such-model"), "no-such-model: expected a folder, 'demo', or a model id"),
    "dtype": (("--dtype", "int3"), "dtype: expected one of float32, bfloat16, int8, int4, got 'int3'"),
    "kv_dtype": (("--kv-dtype", "int4"), "kv_dtype: expected one of float32, bfloat16, int8, got 'int4'"),
    "threads": (("--threads", "0"), "threads: expected 1..1024, got 0"),
    "temperature": (("--temperature", "-1"), "temperature: expected at least 0, got -1.0"),
    "nan": (("--temperature", "nan"), "temperature: expected at least 0, got nan"),
    "top_k": (("--top-k", "-1"), "top_k: expected 0 to"),
    "top_p": (("--top-p", "1.5"), "top_p: expected above 0 and at most 1, got 1.5"),
    "seed": (("--seed", "-1"), "seed: expected 0 to"),
    "max_new_tokens": (("--max-new-tokens", "0"), "max_new_tokens: expected 1 to"),
    "beams": (
        ("--num-beams", "2", "--temperature", "0.5"),
        "temperature: expected 0, unset or do_sample=True with num_beams=2, got 0.5",
    ),
    "groups": (
        ("--num-beams", "4", "--num-beam-groups", "3"),
        "num_beam_groups: expected a divisor of num_beams=4, got 3",
    ),
    "groups without beams": (("--num-beam-groups", "2"), "num_beam_groups: expected a divisor of num_beams=1, got 2"),
    "diversity": (("--diversity-penalty", "nan"), "diversity_penalty: expected at least 0, got nan"),
    "do_sample": (("--do-sample", "--temperature", "0"), "temperature: expected above 0 with do_sample=True, got 0"),
    "schema": (("--json-schema", "{"), "json_schema: expected JSON, got an error in it"),
    "schema file": (("--json-schema", "/nonexistent.json"), "/nonexistent.json: expected a readable file"),
    "grammar file": (("--grammar", "/nonexistent.lark"), "/nonexistent.lark: expected a readable file"),
    "constraints": (("--regex", "a", "--json-schema", "{}"), "regex: expected none beside json_schema, got 'a'"),
    "stop": (("--stop", ""), "stop: expected strings of at least one character, got ''"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(refused: Callable[..., str], options: tuple[str, ...], message: str) -> None:
    assert refused("generate", "Once", *options).startswith(message)


def test_refused_prompts(refused: Callable[..., str]) -> None:
    assert refused("generate", "") == "prompt: expected at least one token, got an empty one"
    assert refused("generate", "-", stdin=b"\n") == "prompt: expected at least one token, got an empty one"
    assert refused("generate", "-", stdin=b"caf\xe9") == "-: expected UTF-8 text, got byte 0xe9 at 3"
    assert refused("generate", "-", stdin=b"word " * 2000).startswith(
        "prompt: expected 1 to 512 tokens (the context), got "
    )


def test_refused_environment() -> None:
    """In a process of its own: the SIMD level is chosen when the engine is imported."""
    for command in (("generate", "Once"), ("info",), ("bench",)):
        code, out, err = run(*command, PYENGINE_ISA="nonsense")
        assert (code, out) == (1, "")
        assert re.fullmatch(r".*: expected one of .*portable.*, got 'nonsense'", the_line(err))
    code, out, err = run("info", PYENGINE_NUM_THREADS="lots")
    assert (code, out) == (1, "")
    assert the_line(err) == "PYENGINE_NUM_THREADS: expected 1..1024, got 'lots'"


def test_refused_checkpoint(refused: Callable[..., str], tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"n_head": 2', '"n_head": 5'))
    message = "config.json: n_embd: expected a multiple of n_head (5), got 32"
    assert message in refused("generate", "Once", "--model", str(tmp_path))
    (tmp_path / "config.json").unlink()
    assert str(tmp_path / "config.json") in refused("bench", "--model", str(tmp_path))


def test_info() -> None:
    code, out, err = run("info", "--threads", "3", PYENGINE_ISA="portable")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("pyengine ")
    assert [line.split("  ")[0] for line in lines[1:]] == ["CPU", "SIMD level", "bfloat16", "threads"]
    assert "portable: set by PYENGINE_ISA, one of " in out
    assert "threads      3: as requested" in out


def test_info_of_a_model() -> None:
    code, out, err = run("info", "--model", "demo")
    assert (code, err) == (0, "")
    assert "demo: gpt2, 5,918,720 parameters\n" in out
    assert re.search(r"^float32 +23\.7 MB +23\.1 MB$", out, re.MULTILINE)
    assert re.search(r"^int8 +6\.5 MB ", out, re.MULTILINE)
    assert re.search(r"^int4 +4\.\d MB ", out, re.MULTILINE)
    assert "\nKV cache     full: float32 6.3 MB, bfloat16 3.1 MB, int8 1.7 MB\n" in out
    assert re.search(r"^operations   8\.3 M a token, 3\.3 M more for its logits", out, re.MULTILINE)


def test_info_of_a_model_that_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt9"}')
    code, _, err = run("info", "--model", str(tmp_path))
    assert code == 1
    assert err.count("\n") == 1
    assert "model_type: expected one of gpt2, got 'gpt9'" in err


def test_perplexity(tmp_path: Path) -> None:
    text = "It was a dark and stormy night; the rain fell in torrents. " * 30  # longer than a window
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    score = pyengine.load("demo", dtype="float32").score(text, 100)
    options = ("--dtype", "float32", "--stride", "100")
    code, out, err = run("perplexity", str(tmp_path / "text.txt"), *options)
    assert (code, out) == (0, f"{score.perplexity:.4f}\n")
    assert err == f"{len(score.token_ids):,} tokens, {-score.logprobs.mean():.4f} nats a token\n"
    assert run("perplexity", "-", *options, stdin=text.encode()) == (code, out, err)


def test_perplexity_refused(refused: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    assert refused("perplexity", str(path)).startswith(f"{path}: expected a readable file, got: ")
    assert refused("perplexity", str(tmp_path)).startswith(f"{tmp_path}: expected a readable file, got: ")
    path.write_bytes(b"na\xefve")
    assert refused("perplexity", str(path)) == f"{path}: expected UTF-8 text, got byte 0xef at 2"
    path.write_text("")
    assert refused("perplexity", str(path)) == "text: expected at least one token, got an empty one"
    path.write_text("a")
    assert refused("perplexity", str(path)).startswith(f"{path}: expected at least two tokens, got one")
    path.write_text("a b c")
    assert refused("perplexity", str(path), "--stride", "0") == "stride: expected 1 to 512 (the context), got 0"


def test_bench() -> None:
    options = "--prompt-tokens 20 --new-tokens 3 --rounds 1 --threads 1"
    code, out, err = run("bench", *options.split())
    assert (code, err) == (0, "")
    header, limits, prefill, decode = out.splitlines()
    assert header.startswith("gpt2, 5,918,720 parameters, int8, KV bfloat16, 1 threads, ")
    assert re.fullmatch(r"limits: [\d.]+ GB/s read \(6 MB\), [\d,]+ GOPS int8", limits)
    assert re.match(r"prefill +20 tokens +[\d,.]+ tokens/s \([\d,.]+ to [\d,.]+\) +\d+% of the peak", prefill)
    assert re.match(r"decode +3 tokens +[\d,.]+ tokens/s .* GB/s of weights, \d+% of the read bandwidth", decode)


def test_bench_refused(refused: Callable[..., str]) -> None:
    for option in ("--prompt-tokens", "--new-tokens", "--rounds"):
        name = option[2:].replace("-", "_")
        assert refused("bench", option, "0") == f"{name}: expected at least 1, got 0"


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")
@pytest.mark.parametrize("arguments", [("generate", "Once upon a time", "--max-new-tokens", "500"), ("info",)])
def test_reader_goes_away(arguments: tuple[str, ...]) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as gone:
        done = subprocess.run(
            [*COMMAND, *arguments], stdout=gone, stderr=subprocess.PIPE, env=environment({}), timeout=60, check=False
        )
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [("generate", "Once", "--max-new-tokens", "3"), ("info",)])
def test_full_disk(arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*COMMAND, *arguments], stdout=full, stderr=subprocess.PIPE, env=environment({}), timeout=60, check=False
        )
    assert done.returncode == 1
    assert done.stderr == b"pyengine: output: expected to write it, got: No space left on device\n"


@pytest.mark.skipif(sys.platform == "win32", reason="a shell of POSIX")
@pytest.mark.parametrize("redirect", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams(redirect: str) -> None:
    command = f'"{sys.executable}" -m pyengine generate Once --max-new-tokens 3 --stats {redirect}'
    done = subprocess.run(command, shell=True, capture_output=True, env=environment({}), timeout=60, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith(b"Once") == done.stdout.endswith(b"\n") == (">&-" not in redirect.replace("2>&-", ""))
    assert done.stderr.startswith(b"prompt of ") == ("2>&-" not in redirect)


def test_text_that_the_locale_lacks(expected: str) -> None:
    code, out, err = run("generate", "“Café”", "--max-new-tokens", "1", PYTHONIOENCODING="ascii", PYTHONUTF8="1")
    assert (code, err) == (0, "")
    assert out.startswith("“Café”")
