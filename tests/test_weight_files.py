"""Weight files: what is read and written, and one clear error for each way to be wrong."""

from __future__ import annotations

import json
import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gella.weights.files import (
    main_file,
    new_folder,
    read_torch,
    read_weights,
    weight_files,
    write_shards,
)


def tensors():
    """Tensors of several dtypes, sizes and memory layouts."""
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(40, 30, generator=generator),
        "a.half": torch.randn(7, 5, generator=generator).bfloat16(),
        "b.turned": torch.randn(6, 4, generator=generator).t(),
        "b.scalar": torch.tensor(3.5),
        "c.count": torch.tensor([1, 2, 3]),
    }


def same(left, right):
    """Equal keys, dtypes and bits."""
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left
    )


@pytest.fixture
def shards(tmp_path):
    """A folder of safetensors shards, as write_shards makes them."""
    folder = tmp_path / "shards"
    folder.mkdir()
    assert len(write_shards(tensors(), folder, max_shard_size="3KB")) > 1
    return folder


def test_shards_come_back_bit_for_bit(shards):
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors().keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors().values())
    for path in (shards, shards / "model.safetensors.index.json"):
        assert same(read_weights(path), tensors())
    names = {p.name for p in weight_files(shards)}
    assert names == {p.name for p in shards.iterdir()}


def test_shards_of_another_dtype_keep_integers(tmp_path):
    write_shards(tensors(), tmp_path, dtype=torch.float16)
    state = read_weights(tmp_path)
    assert {t.dtype for k, t in state.items() if k != "c.count"} == {torch.float16}
    assert state["c.count"].dtype == torch.int64
    assert torch.equal(state["a.weight"], tensors()["a.weight"].half())


def test_tied_and_cut_tensors_are_written_in_full(tmp_path):
    whole = torch.arange(12.0).view(6, 2)
    write_shards({"x": whole, "y": whole, "z": whole[2:4]}, tmp_path)
    assert same(read_weights(tmp_path), {"x": whole, "y": whole, "z": whole[2:4]})
    assert (tmp_path / "model.safetensors").stat().st_size < 500


def test_transformers_reads_the_shards(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    config.save_pretrained(tmp_path)
    write_shards(model.state_dict(), tmp_path, max_shard_size="2KB")
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert same(dict(again.state_dict()), dict(model.state_dict()))


def test_bin_shards_and_their_index(tmp_path):
    state = tensors()
    keys = list(state)
    parts = {"pytorch_model-00001-of-00002.bin": keys[:2]}
    parts["pytorch_model-00002-of-00002.bin"] = keys[2:]
    for name, mine in parts.items():
        torch.save({k: state[k] for k in mine}, tmp_path / name)
    weight_map = {key: name for name, mine in parts.items() for key in mine}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    # What the LLaVA repository puts beside its shards does not disturb.
    torch.save({"model.mm_projector.0.weight": torch.ones(1)}, tmp_path / "mm_projector.bin")
    assert same(read_weights(tmp_path), state)


@pytest.mark.parametrize("wrap", ["model", "state_dict", None])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_in_their_wrappings(tmp_path, wrap, zipped):
    state = {f"module.{k}": t for k, t in tensors().items()}
    loaded = {wrap: state, "iteration": 3} if wrap else state
    path = tmp_path / "w.pth"
    torch.save(loaded, path, _use_new_zipfile_serialization=zipped)
    assert same(read_weights(path), tensors())
    assert same(read_weights(tmp_path), tensors())  # the only file of its folder


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_numpy_pickles_of_the_model_zoo(tmp_path, protocol):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.array([4, 5])}
    whole = {"model": arrays, "__author__": "third party", "matching_heuristics": True}
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(whole, protocol))
    state = read_weights(tmp_path / "w.pkl")
    assert same(state, {k: torch.from_numpy(v) for k, v in arrays.items()})


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        """Ask the unpickler to make a folder."""
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("suffix", ["pkl", "pth"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, suffix):
    path, trace = tmp_path / f"w.{suffix}", tmp_path / "it_ran"
    content = {"model": {"a": Bomb(trace)}}
    if suffix == "pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=r"w\.p.* cannot be read") as caught:
        read_weights(path)
    assert "mkdir" in str(caught.value) or suffix == "pth"
    assert not trace.exists()


def test_object_arrays_are_no_way_in(tmp_path):
    path, trace = tmp_path / "w.pkl", tmp_path / "it_ran"
    path.write_bytes(pickle.dumps({"a": np.array([Bomb(trace)], dtype=object)}))
    with pytest.raises(ValueError, match="only plain data and NumPy arrays are read"):
        read_weights(path)
    path.write_bytes(pickle.dumps({"a": np.array([None], dtype=object)}))
    with pytest.raises(ValueError, match="key a is a ndarray, no tensor"):
        read_weights(path)
    assert not trace.exists()


def test_a_torchscript_archive_is_refused_with_the_way_out(tmp_path):
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2))

        def forward(self, x):
            return x * self.weight

    torch.jit.save(torch.jit.trace(Net(), torch.ones(2)), tmp_path / "ViT-L-14.pt")
    with pytest.raises(ValueError, match=r"TorchScript archive.*torch\.save\(torch\.jit\.load"):
        read_weights(tmp_path / "ViT-L-14.pt")


def lose(folder, shard, index):
    """A shard is gone."""
    (folder / shard).unlink()


def name_a_ghost(folder, shard, index):
    """The index names a key that its shard does not have."""
    index["weight_map"]["ghost"] = shard
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def hide_a_key(folder, shard, index):
    """A shard has a key that the index does not name."""
    save_file({**load_file(folder / shard), "more": torch.ones(1)}, folder / shard)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose, "1 are missing: {shard}"),
        (
            name_a_ghost,
            r"{shard} do not fit: 1 keys of the index are not in .* \(ghost\), 0",
        ),
        (hide_a_key, r"1 of the shard are not in the index \(more\)"),
    ],
)
def test_shards_that_do_not_fit_their_index(shards, damage, message):
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    shard = index["weight_map"]["a.weight"]
    damage(shards, shard, index)
    error = FileNotFoundError if damage is lose else ValueError
    with pytest.raises(error, match=message.format(shard=shard)):
        read_weights(shards)


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": 4}}']
    + ['{"weight_map": {"a": "../secret.safetensors"}}', '{"weight_map": {"a": ["b"]}}'],
)
def test_a_wrong_index(tmp_path, text):
    save_file({"a": torch.ones(1)}, tmp_path / "secret.safetensors")
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json (is no index|names no shard)"):
        read_weights(folder)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.pkl"])
@pytest.mark.parametrize("kept", [0, 0.5, 0.99])
def test_truncated_files(tmp_path, name, kept):
    path = tmp_path / name
    state = {k: t.contiguous() for k, t in tensors().items() if k != "a.half"}
    if name == "w.safetensors":
        save_file(state, path)
    elif name == "w.pth":
        torch.save(state, path)
    else:
        path.write_bytes(pickle.dumps({k: t.numpy() for k, t in state.items()}))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ValueError, match=rf"{name} cannot be read"):
        read_weights(path)


def test_paths_without_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="do not exist"):
        main_file(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        main_file(tmp_path)
    for name in ("x.pth", "y.safetensors"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r"2 weight files \(x.pth, y.safetensors\)"):
        main_file(tmp_path)
    (tmp_path / "w.onnx").write_bytes(b"")
    with pytest.raises(ValueError, match=r"unknown suffix '\.onnx'"):
        read_weights(tmp_path / "w.onnx")


@pytest.mark.parametrize("content", [{}, [1], {"a": 3}, {"model": {"a": "b"}}, {3: torch.ones(1)}])
def test_files_without_tensors(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="w.pth"):
        read_weights(tmp_path / "w.pth")


def test_mapped_tensors_can_be_changed_without_touching_the_file(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "w.pth")
    state = read_torch(tmp_path / "w.pth", mmap=True)
    state["a"].zero_()
    assert read_torch(tmp_path / "w.pth")["a"].tolist() == [1, 1, 1]


def test_a_new_folder_is_whole_or_absent(tmp_path):
    with new_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("1")
        assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(ValueError, match="exists already"), new_folder(tmp_path / "out"):
        pass
    with pytest.raises(RuntimeError, match="stop"), new_folder(tmp_path / "other") as folder:
        raise RuntimeError("stop")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "no" / "where"):
        pass
