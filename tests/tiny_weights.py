"""Tiny public models with random weights, and the GELLA config of their sizes."""

import shutil
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
CONFIG = str(ROOT / "configs" / "gella_tiny_shapes.yaml")
WORDS = 48  # of the vocabulary
VISION = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=32,
    patch_size=8,
)
# What makes the tiny shapes' config fit the models below: KEY VALUE pairs.
OPTS = """
    MODEL.IMAGE_ENCODER.IMAGE_SIZE 32 MODEL.IMAGE_ENCODER.PATCH_SIZE 8
    MODEL.IMAGE_ENCODER.WIDTH 32 MODEL.IMAGE_ENCODER.LAYERS 3 MODEL.IMAGE_ENCODER.HEAD_WIDTH 16
    MODEL.IMAGE_ENCODER.STEM patch MODEL.IMAGE_ENCODER.QUICK_GELU True
    MODEL.LANGUAGE.VOCAB_SIZE 49 MODEL.LANGUAGE.HIDDEN_SIZE 32 MODEL.LANGUAGE.INTERMEDIATE_SIZE 40
    MODEL.LANGUAGE.NUM_LAYERS 2 MODEL.LANGUAGE.NUM_HEADS 2 MODEL.LANGUAGE.NUM_KEY_VALUE_HEADS 1
    MODEL.LANGUAGE.TIE_EMBEDDINGS False MODEL.LANGUAGE.IMAGE_TOKEN_STRIDE 1
""".split()
# Mask decoder and colormap encoder have files and tests of their own.
LEAVE_OUT = ["MODEL.WEIGHTS_ALLOW_MISSING", "['mask_decoder.*','colormap_encoder.*']"]


def llava(seed=0, words=WORDS):
    """transformers' LLaVA-1.5 class, tiny; all weights random, norms and biases too."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    text = LlamaConfig(
        vocab_size=words + 8,  # padded rows
        hidden_size=32,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        rms_norm_eps=1e-5,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION).to_dict(),
        text_config=text.to_dict(),
        image_token_index=words,
        vision_feature_layer=-2,
        image_seq_length=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return perturb(LlavaForConditionalGeneration(config), seed)


def perturb(model, seed=0):
    """Random values in every parameter, so that no two tensors can be mistaken for each other."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def load_gella(weights, opts=OPTS, allow=LEAVE_OUT):
    """The GELLA of the config above with the weights of a file, through its own checkpointer.

    Args:
        weights: file or folder.
        opts: of the model.
        allow: what may be missing, as an override; [] for nothing.
    """
    from detectron2.modeling import build_model

    from gella import load_config
    from gella.weights.checkpoint import load_weights

    cfg = load_config(CONFIG, [*opts, *allow])
    model = build_model(cfg).eval()
    load_weights(model, weights, cfg)
    return model


def fill_hub(cache, models):
    """Lay models into a cache as a download leaves them; what `MODEL.HUB` has to say, by kind.

    Args:
        cache: the hub's cache folder, ``HF_HUB_CACHE``.
        models: by kind the folder that `save_pretrained` wrote.
    """
    names = {}
    for number, (kind, folder) in enumerate(models.items(), 1):
        commit = f"{number:040x}"
        repository = cache / f"models--tiny--{kind}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        shutil.copytree(folder, repository / "snapshots" / commit)
        names[kind] = f"tiny/{kind}@{commit}"
    return names
