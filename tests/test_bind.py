"""From a folder's files to the tensors of a plan: shards, links, prefixes, and what is missing, left over or wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import bound, rewrite, safetensors, save, stored, values, write_checkpoint

from pyengine import checkpoint as module
from pyengine.architectures import gpt2
from pyengine.checkpoint import Checkpoint
from pyengine.errors import CheckpointError, CheckpointFileError
from pyengine.plan import MatrixSpec, VectorSpec

# --- shards and links ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "a\\b.safetensors", "C:\\x.safetensors",
     "C:x.safetensors", "..", ".", "", "/", ".safetensors", "x.bin", "x.safetensors.bin", "x.SAFETENSORS",
     "x.safetensors/", "x\0.safetensors", "x.safetensors\0", "x.safetensors\n", "\ud800.safetensors",
     "~/x.safetensors", None, 3, True, ["x.safetensors"], {"x.safetensors": 1}],
)  # fmt: skip
def test_a_shard_name_that_is_not_plain_is_refused(name: object, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", shards=2)
    (tmp_path / "x.safetensors").write_bytes(safetensors({}))
    index = json.loads((folder / module.INDEX).read_text())
    index["weight_map"]["wte.weight"] = name
    (folder / module.INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    where = f"{folder / module.INDEX}: weight_map: 'wte.weight'"
    assert str(caught.value) == f"{where}: expected a plain *.safetensors name, got {name!r}"


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": ["a"]}, {"weight_map": None}])
def test_an_index_without_a_weight_map_is_refused(index: object, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / module.INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="weight_map: expected an object"):
        Checkpoint.open(tmp_path)


def test_an_index_that_shards_contradict_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, shards=2)
    first, second = (folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    index = json.loads((folder / module.INDEX).read_text())
    with pytest.raises(CheckpointError, match=r"duplicate key 'weight_map'"):
        (folder / module.INDEX).write_text('{"weight_map": {}, "weight_map": {}}')
        Checkpoint.open(folder)

    index["weight_map"]["ghost"] = first.name
    (folder / module.INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=rf"{first}: expected what .* places here, got no 1 tensor: 'ghost'"):
        Checkpoint.open(folder)

    del index["weight_map"]["ghost"]
    (folder / module.INDEX).write_text(json.dumps(index))
    whole = second.read_bytes()
    second.write_bytes(first.read_bytes())
    with pytest.raises(CheckpointError, match=rf"{second}: expected what"):
        Checkpoint.open(folder)

    second.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=rf"{second}: .* truncated"):
        Checkpoint.open(folder)

    second.unlink()
    with pytest.raises(CheckpointFileError, match=str(second)):
        Checkpoint.open(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, shards=2)
    both = folder / "model-00002-of-00002.safetensors"
    with Checkpoint.open(folder) as checkpoint:
        tensors = {name: ("F32", values(checkpoint, name)) for name in checkpoint.tensors}
    save(both, tensors)
    with pytest.raises(CheckpointError, match=rf"{both}: expected each tensor once, got again \d+ tensors: 'h\.0"):
        Checkpoint.open(folder)


def link_into_cache(cache: Path, folder: Path, shared_store: bool) -> Path:
    """The folder's files as huggingface_hub keeps them: snapshots/<revision>/name → blobs/<hash> (→ a shared store)."""
    repo = cache / "models--org--name"
    snapshot = repo / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for i, path in enumerate(sorted(folder.iterdir())):
        blob = repo / "blobs" / f"{i:064x}"
        if shared_store:
            real = cache / "blobs" / "00" / blob.name
            real.parent.mkdir(parents=True, exist_ok=True)
            blob.symlink_to(Path("../../blobs/00") / blob.name)
        else:
            real = blob
        path.rename(real)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("shared_store", [False, True])
def test_links_of_the_hugging_face_cache_load(shards: int, shared_store: bool, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", shards=shards)
    expected = {tensor.name: tensor.shape for tensor in bound(folder).values()}
    snapshot = link_into_cache(tmp_path / "hub", folder, shared_store)
    assert {tensor.name: tensor.shape for tensor in bound(snapshot).values()} == expected
    (tmp_path / "main").symlink_to(snapshot)
    assert {tensor.name: tensor.shape for tensor in bound(tmp_path / "main").values()} == expected


def test_links_inside_the_folder_load_and_others_do_not(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "plain" / "model")
    weights = folder / "model.safetensors"
    (folder / "kept").mkdir()
    weights.rename(folder / "kept" / "w")
    weights.symlink_to("kept/w")
    assert bound(folder)

    outside = tmp_path / "blobs" / "w"
    outside.parent.mkdir()
    (folder / "kept" / "w").rename(outside)
    for target in ("../../blobs/w", outside, "../gone"):
        weights.unlink()
        weights.symlink_to(target)
        with pytest.raises(CheckpointFileError, match=r"model\.safetensors: expected"):
            Checkpoint.open(folder)

    other = tmp_path / "hub" / "models--org--other" / "blobs" / "w"
    other.parent.mkdir(parents=True)
    outside.rename(other)
    weights.unlink()
    weights.symlink_to("missing")
    snapshot = link_into_cache(tmp_path / "hub", folder, shared_store=False)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(other)  # of another repository
    with pytest.raises(CheckpointFileError, match=r"expected a regular file inside .*, got .*other"):
        Checkpoint.open(snapshot)


# --- bind ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_finds_its_tensor(dtype: str, shards: int, prefix: str, tied: bool, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, {"tie_word_embeddings": tied}, dtype, shards, prefix)
    tensors = bound(folder)
    plan = gpt2.plan(json.loads((folder / "config.json").read_text()))
    specs: dict[str, MatrixSpec | VectorSpec] = {**plan.matrices, **plan.vectors}
    assert tensors.keys() == specs.keys()
    assert tensors["token_embedding"].name == prefix + "wte.weight"
    assert ("lm_head" in tensors) == (not tied)
    for weight, spec in specs.items():
        tensor = tensors[weight]
        assert tensor.name in (spec.tensor, prefix + spec.tensor)
        assert tensor.shape == spec.shape
        assert tensor.dtype == {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
        assert tensor.path.parent == folder


def test_prefixes_may_be_mixed_but_not_name_a_tensor_twice(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    rewrite(folder, lambda tensors: tensors.update({"transformer.ln_f.bias": tensors.pop("ln_f.bias")}))
    assert bound(folder)["ln_f.bias"].name == "transformer.ln_f.bias"
    rewrite(folder, lambda tensors: tensors.update({"ln_f.bias": tensors["transformer.ln_f.bias"]}))
    with pytest.raises(CheckpointError, match=r"'ln_f\.bias': expected one tensor .* 'transformer\.ln_f\.bias'"):
        bound(folder)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_buffers_of_old_checkpoints_are_ignored_whatever_they_hold(prefix: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, prefix=prefix)
    masks = {
        f"{prefix}h.0.attn.bias": ("BOOL", np.ones((1, 1, 64, 64), np.uint8)),
        f"{prefix}h.1.attn.masked_bias": ("F64", np.array(-1e4)),
    }
    rewrite(folder, lambda tensors: tensors.update(masks))
    assert len(bound(folder)) == 28
    write_checkpoint(folder)
    rewrite(folder, lambda tensors: tensors.update({"h.0.attn.bias.x": ("F32", np.zeros(1, np.float32))}))
    with pytest.raises(CheckpointError, match=r"got also 1 tensor: 'h\.0\.attn\.bias\.x'"):
        bound(folder)


def test_missing_tensors_are_named_with_what_comes_closest(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    rewrite(folder, lambda tensors: tensors.update({"h.0.attn.c_atn.bias": tensors.pop("h.0.attn.c_attn.bias")}))
    with pytest.raises(CheckpointError) as caught:
        bound(folder)
    name = "'h.0.attn.c_attn.bias'"
    assert str(caught.value) == f"{folder}: missing 1 tensor: {name}; the closest to {name} is 'h.0.attn.c_atn.bias'"

    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 4}))
    with pytest.raises(CheckpointError, match=r"missing 25 tensors: 'h\.0\.attn\.c_attn\.bias', 'h\.2\..*, …"):
        bound(folder)

    (folder / "config.json").write_text(json.dumps(config))
    rewrite(folder, lambda tensors: tensors.update({"h.0.attn.c_attn.bias": tensors.pop("h.0.attn.c_atn.bias")}))
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    with pytest.raises(CheckpointError, match=r"missing 1 tensor: 'lm_head\.weight'$"):
        bound(folder)


def test_tensors_left_over_are_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 1}))
    with pytest.raises(CheckpointError, match=r"expected a gpt2 alone, got also 12 tensors: 'h\.1\.attn\.c_at"):
        bound(folder)


def test_a_misshapen_tensor_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    rewrite(folder, lambda tensors: tensors.update({"wte.weight": ("F32", tensors["wte.weight"][1][:-1])}))
    with pytest.raises(CheckpointError, match=r"'wte\.weight': shape: expected \[300, 32\], got \[299, 32\]"):
        bound(folder)


def test_a_transposed_tensor_is_named(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    name = "h.1.mlp.c_fc.weight"
    rewrite(folder, lambda tensors: tensors.update({name: ("F32", tensors[name][1].T)}))
    with pytest.raises(CheckpointError, match=r"c_fc\.weight': shape: expected \[32, 128\], got \[128, 32\]"):
        bound(folder)


@pytest.mark.parametrize("dtype", ["I64", "F64", "I8", "F8_E4M3", "U16", "BOOL"])
def test_a_tensor_of_a_wrong_dtype_is_named(dtype: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    data = np.zeros(32, f"V{module.BITS[dtype] // 8}")
    rewrite(folder, lambda tensors: tensors.update({"ln_f.bias": (dtype, data)}))
    with pytest.raises(CheckpointError, match=rf"'ln_f\.bias': dtype: expected one of F32, F16, BF16, got {dtype}"):
        bound(folder)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_a_tied_head_may_be_there_if_it_is_a_copy(prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLAB", 1000)  # 300 * 32 * 4 bytes: several slabs, the last of them shorter
    folder = write_checkpoint(tmp_path, prefix=prefix)
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors[f"{prefix}wte.weight"]}))
    assert len(bound(folder)) == 28

    def spoil(at: int) -> Any:
        def change(tensors: Any) -> None:
            head = tensors[f"{prefix}wte.weight"][1].copy()
            head.flat[at] += 1
            tensors["lm_head.weight"] = ("F32", head)

        return change

    def recast(dtype: str, shape: tuple[int, int]) -> Any:
        def change(tensors: Any) -> None:
            tensors["lm_head.weight"] = (dtype, tensors[f"{prefix}wte.weight"][1].reshape(shape))

        return change

    half = stored(np.zeros((300, 32), np.float32), "float16")
    for change in (
        spoil(0),
        spoil(-1),
        lambda tensors: tensors.update({"lm_head.weight": half}),
        recast("F32", (32, 300)),
        recast("I32", (300, 32)),
    ):
        good = (folder / "model.safetensors").read_bytes()
        rewrite(folder, change)
        with pytest.raises(CheckpointError, match=rf"'lm_head\.weight': tie_word_embeddings.* '{prefix}wte\.weight'"):
            bound(folder)
        (folder / "model.safetensors").write_bytes(good)


def test_messages_stay_short_whatever_the_file_says(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    rewrite(folder, lambda tensors: tensors.update({"x" * 1_000_000: ("F32", np.zeros(1, np.float32))}))
    with pytest.raises(CheckpointError, match="got also 1 tensor: 'xxx") as caught:
        bound(folder)
    assert len(str(caught.value)) < 1000


def test_reference_checkpoints_bind(shared: Path) -> None:
    folders = [*sorted((shared / "data/golden").iterdir()), shared / "data/demo-model"]
    for folder in folders:
        assert bound(folder)["token_embedding"].name == "transformer.wte.weight" or folder.name == "demo-model"
