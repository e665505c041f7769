"""GELLA's language branch against transformers' own LLaVA-1.5, with the same random weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from gella.modeling.image_encoder import CLIPImageEncoder
from gella.modeling.language_decoder import IGNORE_INDEX, IMAGE_TOKEN_ID, LanguageDecoder
from gella.weights import LlavaOriginal, detect
from gella.weights.checkpoint import check_state_dict
from gella.weights.llava import fit_words

# 99 words; the last row is <image> in LLaVA and <SEG> here.
VOCAB, EXTRA, EOS, PAD = 100, 99, 2, 0
STEPS = 24


class Branch(nn.Module):
    """The two boxes of GELLA that LLaVA has too, under GELLA's names."""

    def __init__(self, image_encoder: nn.Module, language_decoder: nn.Module) -> None:
        super().__init__()
        self.image_encoder, self.language_decoder = image_encoder, language_decoder


def make_llava(seed: int = 0) -> Any:
    """A tiny LLaVA-1.5 with random weights that matter."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig
    from transformers import LlavaForConditionalGeneration as Llava

    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=56,
        patch_size=14,
        hidden_act="quick_gelu",
    )
    text = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=EXTRA,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(seed)
    llava = Llava(config).eval()
    with torch.no_grad():
        for name, parameter in llava.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
            elif "norm" not in name:
                parameter.normal_(std=0.1)
        llava.lm_head.weight.mul_(4.0)  # clear preferences, also in bfloat16
        llava.lm_head.weight[[EXTRA, EOS]] = 0.0  # never answered, so that answers are long
    return llava


def make_branch(llava: Any, *, through_original: bool = False, lookup: int = 0) -> Branch:
    """GELLA's boxes of the same sizes with LLaVA's weights, loaded strictly."""
    vision, text = llava.config.vision_config, llava.config.text_config
    encoder = CLIPImageEncoder(
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        width=vision.hidden_size,
        layers=vision.num_hidden_layers,
        head_width=vision.hidden_size // vision.num_attention_heads,
        mlp_ratio=vision.intermediate_size / vision.hidden_size,
    )
    decoder = LanguageDecoder(
        model_config=text,
        image_dim=vision.hidden_size,
        projector="mlp2x_gelu",
        image_token_stride=1,
        max_positions=text.max_position_embeddings,
        prompt_lookup_tokens=lookup,
    )
    branch = Branch(encoder, decoder)
    foreign = llava.state_dict()
    state = detect("llava", foreign, "tiny LLaVA")().to_gella(foreign)
    if through_original:
        original = LlavaOriginal().from_gella(state)
        assert "model.mm_projector.0.weight" in original
        state = detect("llava", original, "original layout")().to_gella(original)
    state, _ = fit_words(state, VOCAB)
    check_state_dict(state, branch, source="tiny LLaVA")
    branch.load_state_dict(state)
    return branch.eval()


def make_inputs(lengths: tuple[int, ...] = (9, 9)) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Images and prompts `<s> words <image> x 16 words`, placeholders as GELLA has them."""
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(len(lengths), 3, 56, 56, generator=generator)
    prompts = []
    for length in lengths:
        words = torch.randint(3, EXTRA, (length,), generator=generator)
        image = torch.full((16,), IMAGE_TOKEN_ID)
        prompts.append(torch.cat([torch.tensor([1]), words[:3], image, words[3:]]))
    return images, prompts


def for_llava(ids: torch.Tensor) -> torch.Tensor:
    return torch.where(ids == IMAGE_TOKEN_ID, EXTRA, ids)


def gella_logits(branch: Branch, image: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    grid = branch.image_encoder(image)["penultimate"]
    labels = torch.full_like(ids, IGNORE_INDEX)
    output = branch.language_decoder(grid, [ids], [labels], [torch.arange(len(ids))])
    return branch.language_decoder.llama.lm_head(output.seg_embeddings[0])


@pytest.mark.parametrize("through_original", [False, True])
@torch.no_grad()
def test_logits_on_image_and_text(through_original):
    llava = make_llava()
    branch = make_branch(llava, through_original=through_original)
    images, prompts = make_inputs()
    expected = llava(
        input_ids=torch.stack([for_llava(ids) for ids in prompts]), pixel_values=images
    ).logits
    for i, ids in enumerate(prompts):
        ours = gella_logits(branch, images[i : i + 1], ids)
        assert float((ours - expected[i])[:, :EXTRA].abs().max()) < 1e-4
        # The image matters, and so does its place.
        other = gella_logits(branch, images[1 - i : 2 - i], ids)
        assert float((other - expected[i])[4:, :EXTRA].abs().max()) > 0.1


def llava_answer(llava: Any, image: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The STEPS tokens that transformers' own class generates."""
    full = llava.generate(
        input_ids=for_llava(ids)[None],
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        pixel_values=image,
        max_new_tokens=STEPS,
        do_sample=False,
    )[0]
    assert len(full) == len(ids) + STEPS
    return full[len(ids) :]


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_greedy_tokens(seed):
    llava = make_llava(seed)
    branch = make_branch(llava, lookup=5)
    images, prompts = make_inputs()
    options = dict(max_new_tokens=STEPS, eos_token_id=EOS, pad_token_id=PAD)
    for i, ids in enumerate(prompts):
        expected = llava_answer(llava, images[i : i + 1], ids).tolist()
        assert len(set(expected)) > 5  # not one word again and again
        grid = branch.image_encoder(images[i : i + 1])["penultimate"]
        for snippets in (None, []):
            answer = branch.language_decoder.generate(grid, [ids], snippets=snippets, **options)[0]
            assert answer.tolist() == expected


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_greedy_tokens_in_bfloat16(seed):
    """The same image features give the same tokens; the same image gives them up to rounding.

    open_clip's and transformers' attention round differently in bfloat16, by one unit in the last
    place, and random weights have close decisions. So with GELLA's own features each token of LLaVA
    must be the best one or within that rounding of it.
    """
    llava = make_llava(seed)
    branch = make_branch(llava).to(torch.bfloat16)
    llava = llava.to(torch.bfloat16)
    decoder = branch.language_decoder
    images, prompts = make_inputs()
    images = images.to(torch.bfloat16)
    options = dict(max_new_tokens=STEPS, eos_token_id=EOS, pad_token_id=PAD)
    for i, ids in enumerate(prompts):
        image = images[i : i + 1]
        expected = llava_answer(llava, image, ids)
        layers = llava.model.vision_tower(image, output_hidden_states=True).hidden_states
        theirs = layers[-2][:, 1:].transpose(1, 2).reshape(1, -1, 4, 4)
        assert decoder.generate(theirs, [ids], **options)[0].tolist() == expected.tolist()
        ours = branch.image_encoder(image)["penultimate"]
        assert torch.allclose(ours, theirs, atol=2**-5)
        logits = gella_logits(branch, image, torch.cat([ids, expected]))[len(ids) - 1 : -1].float()
        behind = logits.amax(1) - logits.gather(1, expected[:, None])[:, 0]
        assert float(behind.max()) <= 0.25  # two units in the last place of logits of 16 to 32


@torch.no_grad()
def test_a_padded_batch_generates_the_tokens_of_llava():
    llava = make_llava()
    branch = make_branch(llava)
    images, prompts = make_inputs((4, 12, 8))
    grid = branch.image_encoder(images)["penultimate"]
    options = dict(max_new_tokens=STEPS, eos_token_id=EOS, pad_token_id=PAD)
    answers = branch.language_decoder.generate(grid, prompts, **options)
    for i, ids in enumerate(prompts):
        expected = llava_answer(llava, images[i : i + 1], ids)
        assert answers[i].tolist() == expected.tolist()
