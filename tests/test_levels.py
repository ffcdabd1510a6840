"""All SIMD levels with FMA give the same bits: a small C program (levels/dump.c) hashes what every kernel gives: here;
with intrinsics that this CPU may lack, in plain C; as 64-bit Arm, where Debian's cross compiler and qemu-user are."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEVELS = sorted(path.stem for path in (ROOT / "csrc" / "isa").glob("*.c"))
CFLAGS = ["-std=c11", "-O3", "-ffp-contract=off", "-fno-math-errno"]  # as in setup.py
# levels/emulated/immintrin.h, and a compiler that says it is MSVC: csrc has no assembly for that. -O3 takes minutes.
EMULATED = ["-O1", "-w", "-mavx2", "-mfma", f"-I{ROOT / 'tests' / 'levels' / 'emulated'}"]
EMULATED += ["-U__clang__", "-D_MSC_VER=1930"]
EMULATED += ["-D__forceinline=inline __attribute__((always_inline))", "-D__declspec(x)=__attribute__((aligned(64)))"]
ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"

Dump = Callable[[int], dict[str, dict[str, str]]]


def build(compiler: list[str], folder: Path, levels: list[str] = LEVELS, flags: Sequence[str] = ()) -> str:
    """Path of levels/dump.c, compiled with these levels, and those with flags of their own."""
    program, cc = str(folder / "dump"), [*compiler, *CFLAGS, f"-I{ROOT / 'csrc'}"]
    objects = {str(ROOT / "csrc" / "isa" / f"{level}.c"): str(folder / f"{level}.o") for level in levels}
    commands = [[*cc, *flags, "-c", source, "-o", compiled] for source, compiled in objects.items()]
    defines = "-DPE_LEVELS=" + " ".join(f"PE_LEVEL({level})" for level in levels)
    sources = [str(ROOT / "tests" / "levels" / "dump.c"), str(ROOT / "csrc" / "cpu.c")]
    for command in [*commands, [*cc, defines, *sources, *objects.values(), "-o", program, "-lm"]]:
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    return program


def run(*command: str) -> dict[str, dict[str, str]]:
    """{level: {"kernel size": hash}}"""
    hashes: dict[str, dict[str, str]] = {}
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        level, kernel, size, value = line.split()
        hashes.setdefault(level, {})[f"{kernel} {size}"] = value
    return hashes


def different(a: dict[str, str], b: dict[str, str]) -> set[str]:
    """The "kernel size" keys whose hashes aren't the same in both."""
    return {key for key in a.keys() | b.keys() if a.get(key) != b.get(key)}


@pytest.fixture(scope="module")
def compiler() -> list[str]:
    compiler = shlex.split(os.environ.get("CC", "cc"))
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"needs a C compiler ({compiler[0]})")
    return compiler


@pytest.fixture(scope="module")
def native(compiler: list[str], tmp_path_factory: pytest.TempPathFactory) -> Dump:
    program = build(compiler, tmp_path_factory.mktemp("native"))
    return lambda seed: run(program, str(seed))


@pytest.fixture(scope="module")
def emulated(compiler: list[str], native: Dump, tmp_path_factory: pytest.TempPathFactory) -> Dump:
    if "avx2" not in native(1):
        pytest.skip("needs a CPU with AVX2")
    levels = [level for level in LEVELS if level.startswith("avx")]
    program = build(compiler, tmp_path_factory.mktemp("emulated"), levels, EMULATED)
    return lambda seed: run(program, str(seed))


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Dump:
    for tool in (ARM_COMPILER, ARM_EMULATOR):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool} (Debian: gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user)")
    program = build([ARM_COMPILER, "-static"], tmp_path_factory.mktemp("arm"))
    return lambda seed: run(ARM_EMULATOR, "-cpu", "max", program, str(seed))


def test_every_kernel_is_hashed(native: Dump) -> None:
    table = (ROOT / "csrc" / "kernels.h").read_text().split("typedef struct pe_kernels {")[1]
    entries = set(re.findall(r"\(\*(\w+)\)\(", table))
    entries -= {"spin_f32", "spin_bf16", "spin_q8", "read"}  # their results mean nothing
    assert {key.split()[0] for key in native(1)["portable"]} == entries


def test_levels_give_the_same_bits(native: Dump) -> None:
    levels = native(1)
    portable, fused = levels.pop("portable"), list(levels)
    if len(fused) < 2:
        pytest.skip(f"needs a CPU with two levels that have FMA (it has {fused})")
    for name in fused[1:]:
        assert different(levels[name], levels[fused[0]]) == set(), f"{name} against {fused[0]}"
    # The comparison can fail: without FMA long sums round twice, and little else differs.
    kernels = {key.split()[0] for key in different(portable, levels[fused[0]])}
    assert {"matmul_f32", "matmul_q8", "matmul_q4", "accumulate_f32", "layer_norm"} <= kernels
    exact = {"quantize_q8", "pack_q8", "pack_bf16", "load_panel", "row_max", "narrow_bf16", "narrow_q8"}
    exact |= {"largest", "turn_words"}
    assert not kernels & exact


def test_hashes_depend_on_the_input(native: Dump) -> None:
    for name, hashes in native(1).items():
        kernels = {key.split()[0] for key in hashes}
        assert {key.split()[0] for key in different(hashes, native(2)[name])} == kernels, name


def test_emulated_levels_give_the_same_bits(native: Dump, emulated: Dump) -> None:
    expected, levels = native(1)["avx2"], emulated(1)
    assert set(levels) == {level for level in LEVELS if level.startswith("avx")}
    for name, hashes in levels.items():
        assert different(hashes, expected) == set(), name


@pytest.mark.parametrize("seed", [1, 2])
def test_neon_gives_the_same_bits(native: Dump, arm: Dump, seed: int) -> None:
    here, there = native(seed), arm(seed)
    if "avx2" not in here:
        pytest.skip(f"needs a CPU with AVX2 to compare with (it has {list(here)})")
    assert set(there) == {"neon", "portable"}
    assert different(there["neon"], here["avx2"]) == set()
    assert different(there["portable"], here["portable"]) == set()
