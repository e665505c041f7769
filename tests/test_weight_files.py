"""Weight files: what is read and written, and one clear error for each way to be wrong."""

import json
import os
import pickle

import numpy as np
import pytest
import torch
from refusals import refused
from safetensors.torch import load_file, save_file

from gella.weights import files
from gella.weights.files import made_for


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "a.weight": torch.randn(40, 30, generator=generator),
        "a.half": torch.randn(7, 5, generator=generator).bfloat16(),
        "b.turned": torch.randn(6, 4, generator=generator).t(),
        "b.scalar": torch.tensor(3.5),
        "c.count": torch.tensor([1, 2, 3]),
    }


def same(left, right):
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left
    )


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    assert len(files.write_shards(tensors(), folder, max_shard_size="3KB")) > 1
    return folder


def test_shards_come_back_bit_for_bit(shards, tmp_path):
    index = json.loads((shards / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors().keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors().values())
    for path in (shards, shards / "model.safetensors.index.json"):
        assert same(files.read_weights(path), tensors())
    assert set(files.weight_files(shards)) == set(shards.iterdir())
    # Tied and cut ones are written in full.
    whole = torch.arange(12.0).view(6, 2)
    tied = {"x": whole, "y": whole, "z": whole[2:4]}
    files.write_shards(tied, tmp_path)
    assert same(files.read_weights(tmp_path), tied)
    assert (tmp_path / "model.safetensors").stat().st_size < 500


def test_shards_of_another_dtype_keep_integers(tmp_path):
    files.write_shards(tensors(), tmp_path, dtype=torch.float16)
    expected = {k: t.half() if k != "c.count" else t for k, t in tensors().items()}
    assert same(files.read_weights(tmp_path), expected)


def test_transformers_reads_the_shards(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    config.save_pretrained(tmp_path)
    files.write_shards(model.state_dict(), tmp_path, max_shard_size="2KB")
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert same(dict(again.state_dict()), dict(model.state_dict()))


def test_bin_shards_and_their_index(tmp_path):
    state, weight_map = tensors(), {}
    for number, keys in enumerate((list(state)[:2], list(state)[2:]), 1):
        name = f"pytorch_model-0000{number}-of-00002.bin"
        torch.save({k: state[k] for k in keys}, tmp_path / name)
        weight_map |= dict.fromkeys(keys, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    # The LLaVA repository's stands beside its shards.
    torch.save({"model.mm_projector.0.weight": torch.ones(1)}, tmp_path / "mm_projector.bin")
    assert same(files.read_weights(tmp_path), state)


@pytest.mark.parametrize("wrap", ["model", "state_dict", None])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_in_their_wrappings(tmp_path, wrap, zipped):
    state = {f"module.{k}": t for k, t in tensors().items()}
    loaded = {wrap: state, "iteration": 3} if wrap else state
    path = tmp_path / "w.pth"
    torch.save(loaded, path, _use_new_zipfile_serialization=zipped)
    assert same(files.read_weights(path), tensors())
    assert same(files.read_weights(tmp_path), tensors())  # the only file of its folder


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_numpy_pickles_of_the_model_zoo(tmp_path, protocol):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.array([4, 5])}
    whole = {"model": arrays, "__author__": "third party", "matching_heuristics": True}
    (tmp_path / "w.pkl").write_bytes(pickle.dumps(whole, protocol))
    state = files.read_weights(tmp_path / "w.pkl")
    assert same(state, {k: torch.from_numpy(v) for k, v in arrays.items()})


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name, write, told", [
    ("w.pkl", lambda content, path: path.write_bytes(pickle.dumps(content)), "mkdir"),
    ("w.pth", torch.save, ""),
])  # fmt: skip
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, name, write, told):
    path, trace = tmp_path / name, tmp_path / "it_ran"
    write({"model": {"a": Bomb(trace)}}, path)
    with pytest.raises(ValueError, match=rf"{name}.* cannot be read(?s:.*{told})"):
        files.read_weights(path)
    for array, message in (
        ([Bomb(trace)], "only plain data and NumPy arrays are read"),
        ([None], "key a is a ndarray, no tensor"),
    ):
        (tmp_path / "o.pkl").write_bytes(pickle.dumps({"a": np.array(array, dtype=object)}))
        refused(message, files.read_weights, tmp_path / "o.pkl")
    assert not trace.exists()


def test_a_torchscript_archive_is_refused_with_the_way_out(tmp_path):
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(2)), tmp_path / "ViT-L-14.pt")
    message = r"TorchScript archive.*torch\.save\(torch\.jit\.load"
    refused(message, files.read_weights, tmp_path / "ViT-L-14.pt")


INDEX = "model.safetensors.index.json"
GHOST = r"{shard} do not fit: 1 keys of the index are not in .* \(ghost\), 0"


@pytest.mark.parametrize("damage, message", [
    (lambda path, index: path.unlink(), "1 are missing: {shard}"),
    (lambda path, index: index["weight_map"].update(ghost=path.name), GHOST),
    (lambda path, index: save_file({**load_file(path), "more": torch.ones(1)}, path),
     r"1 of the shard are not in the index \(more\)"),
])  # fmt: skip
def test_shards_that_do_not_fit_their_index(shards, damage, message):
    index = json.loads((shards / INDEX).read_text())
    shard = index["weight_map"]["a.weight"]
    damage(shards / shard, index)
    (shards / INDEX).write_text(json.dumps(index))
    error = ValueError if (shards / shard).exists() else FileNotFoundError
    refused(message.format(shard=shard), files.read_weights, shards, error=error)


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
    refused(r"index\.json (is no index|names no shard)", files.read_weights, folder)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.pkl"])
@pytest.mark.parametrize("kept", [0, 0.5, 0.99])
def test_truncated_files(tmp_path, name, kept):
    path, state = tmp_path / name, {k: t.contiguous() for k, t in tensors().items()}
    del state["a.half"]
    if name == "w.pkl":
        path.write_bytes(pickle.dumps({k: t.numpy() for k, t in state.items()}))
    else:
        (save_file if name == "w.safetensors" else torch.save)(state, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    refused(rf"{name} cannot be read", files.read_weights, path)


def test_paths_without_weights(tmp_path):
    refused("do not exist", files.main_file, tmp_path / "nothing", error=FileNotFoundError)
    refused("holds no weights", files.main_file, tmp_path, error=FileNotFoundError)
    for name in ("x.pth", "y.safetensors"):
        (tmp_path / name).write_bytes(b"")
    refused(r"2 weight files \(x.pth, y.safetensors\)", files.main_file, tmp_path)
    (tmp_path / "w.onnx").write_bytes(b"")
    refused(r"unknown suffix '\.onnx'", files.read_weights, tmp_path / "w.onnx")


@pytest.mark.parametrize("content", [{}, [1], {"a": 3}, {"model": {"a": "b"}}, {3: torch.ones(1)}])
def test_files_without_tensors(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    refused("w.pth", files.read_weights, tmp_path / "w.pth")


def test_mapped_tensors_can_be_changed_without_touching_the_file(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "w.pth")
    state = files.read_torch(tmp_path / "w.pth", mmap=True)
    state["a"].zero_()
    assert files.read_torch(tmp_path / "w.pth")["a"].tolist() == [1, 1, 1]


def test_a_new_folder_is_whole_or_absent(tmp_path):
    with files.new_folder(tmp_path / "out") as folder:
        (folder / "x").write_text("1")
        assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(ValueError, match="exists already"), files.new_folder(tmp_path / "out"):
        pass
    with pytest.raises(RuntimeError, match="stop"), files.new_folder(tmp_path / "other") as folder:
        raise RuntimeError("stop")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    with pytest.raises(FileNotFoundError), files.new_folder(tmp_path / "no" / "where"):
        pass


@pytest.mark.parametrize(
    ("card", "purpose"),
    [
        (
            "---\nlibrary_name: gella\n---\n# Title\n\nFor drawn\nscenes.\n\nMore.\n",
            "For drawn scenes.",
        ),
        ("---\nlibrary_name: other\n---\n# Title\n\nFor others.\n", ""),
        ("# The project's own\n\nNo card.\n", ""),
        ("---\nlibrary_name: gella\n---\n# Title\n", ""),
        (None, ""),
    ],
)
def test_a_card_says_what_weights_were_made_for(tmp_path, card, purpose):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    for weights in (tmp_path, tmp_path / "model.safetensors", str(tmp_path)):
        assert made_for(weights) == purpose
    assert made_for("") == ""
