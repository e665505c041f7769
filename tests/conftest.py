"""Fixtures shared by the tests: small things built on the spot, nothing downloaded."""

import logging
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    """A folder with a byte-level BPE tokenizer of 400 tokens, as `save_pretrained` writes it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE(unk_token=None))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "USER: ASSISTANT: There are two semantic nouns, including the red circle and a star."
    bpe.train_from_iterator([text, "Please help me describe the image. The sentence is"], trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=bpe, **names).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir):
    from gella.text.prompts import load_tokenizer

    return load_tokenizer(str(tokenizer_dir))


@pytest.fixture(scope="session")
def scenes(tmp_path_factory):
    """A folder for DETECTRON2_DATASETS with 40 + 4 drawn scenes in ``shapes``; to be read only."""
    import prepare_shapes

    folder = tmp_path_factory.mktemp("scenes")
    prepare_shapes.prepare(folder / "shapes", {"train": 40, "val": 4}, workers=1)
    return folder


@pytest.fixture(scope="session")
def coco_sample():
    """The folder of the two real COCO images; tests that need it skip where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "coco_sample"
    if not folder.is_dir():
        pytest.skip("the two sample COCO images are not at ../shared/coco_sample")
    return folder


@pytest.fixture
def gella_log(caplog, monkeypatch):
    """What gella logs, whoever set the logging up before."""
    logger = logging.getLogger("gella")
    monkeypatch.setattr(logger, "propagate", False)
    logger.addHandler(caplog.handler)
    caplog.set_level(logging.INFO, "gella")
    yield caplog
    logger.removeHandler(caplog.handler)


@pytest.fixture
def closed_logs():
    """For a run in this process: no other test shall write to its log."""
    yield
    for name in ("detectron2", "fvcore", "gella"):
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True


@pytest.fixture(scope="session")
def small_shapes(tmp_path_factory):
    """Six training and four held-out scenes in all formats; not to be changed."""
    import prepare_shapes

    folder = tmp_path_factory.mktemp("data") / "shapes"
    prepare_shapes.prepare(folder, {"train": 6, "val": 4}, seed=2, workers=1)
    return folder
