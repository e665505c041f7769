"""The mask decoder: transformers' Mask2Former under our two kinds of queries."""

from __future__ import annotations

import copy

import pytest
import torch
from detectron2.layers import ShapeSpec

from gella.modeling.entity_queries import EntityQueries, crop_masks, mask_geometry
from gella.modeling.mask_decoder import Mask2FormerHead

STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
SHAPES = {name: ShapeSpec(channels=16, stride=s) for name, s in STRIDES.items()}
SIZES = dict(
    input_shape=SHAPES,
    num_queries=7,
    shape_size=8,
    hidden_dim=32,
    mask_dim=32,
    num_heads=4,
    encoder_layers=1,
    encoder_ffn_dim=48,
    decoder_layers=4,
    decoder_ffn_dim=40,
)


def build(queries, perturb=True):
    torch.manual_seed(0)
    head = Mask2FormerHead(**{**SIZES, "queries": queries}).eval()
    if perturb:  # fresh norms are the identity and would hide a missing one
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return head


def features(batch=2, size=64):
    torch.manual_seed(1)
    return {name: torch.randn(batch, 16, size // s, size // s) for name, s in STRIDES.items()}


def masks(batch=2, count=5, size=64):
    torch.manual_seed(2)
    ids = torch.randint(0, count, (batch, size // 8, size // 8))
    ids = ids.repeat_interleave(8, 1).repeat_interleave(8, 2)
    return ids[:, None] == torch.arange(count)[None, :, None, None]


def assert_same(one, two, rows=slice(None)):
    torch.testing.assert_close(one.query_embeddings, two.query_embeddings[rows], atol=1e-5, rtol=0)
    for name in ("entity_logits", "mask_logits"):
        assert len(getattr(one, name)) == len(getattr(two, name)) == 5
        for a, b in zip(getattr(one, name), getattr(two, name)):
            torch.testing.assert_close(a, b[rows], atol=1e-5, rtol=1e-5)


def test_learned_queries_give_what_transformers_gives():
    from transformers import Mask2FormerConfig
    from transformers.models.mask2former import modeling_mask2former as reference

    head, maps = build("learned"), features()
    config = Mask2FormerConfig(
        feature_size=32, hidden_dim=32, mask_feature_size=32, num_attention_heads=4,
        encoder_layers=1, encoder_feedforward_dim=48, decoder_layers=5, dim_feedforward=40,
        num_queries=7,
    )  # fmt: skip
    pixel = reference.Mask2FormerPixelDecoder(config, [16, 16, 16, 16]).eval()
    pixel.load_state_dict(head.pixel_decoder.state_dict())
    module = reference.Mask2FormerTransformerModule(32, config).eval()
    module.load_state_dict(head.transformer.state_dict())
    with torch.no_grad():
        out = head(maps)
        pixels = pixel(list(maps.values()))
        wanted = module(pixels.multi_scale_features, pixels.mask_features, output_attentions=True)
        same = head.transformer(pixels.multi_scale_features, pixels.mask_features)
    for mine, theirs, exact in zip(
        out.mask_logits, wanted.masks_queries_logits, same.masks_queries_logits
    ):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-5)
        assert torch.equal(mine, exact)  # the module's own forward, bit for bit
    state = wanted.intermediate_hidden_states[-1].transpose(0, 1)
    torch.testing.assert_close(out.query_embeddings, state, atol=1e-5, rtol=1e-5)
    assert (out.query_embeddings - wanted.last_hidden_state).abs().max() > 1e-2
    assert out.query_valid.all() and out.query_valid.shape == (2, 7)


@pytest.mark.parametrize("queries", ["learned", "entity"])
def test_embeddings_logits_and_masks_belong_together(queries):
    head, maps = build(queries), features()
    with torch.no_grad():
        out = head(maps, masks())
        pixels = head.pixel_decoder(list(maps.values()))
        state = out.query_embeddings
        if queries == "entity":  # its evidence is for the association alone
            state = state - head.entity_queries(maps["res2"], masks())[2]
        embedder = head.transformer.decoder.mask_predictor.mask_embedder
        wanted = torch.einsum("bqc,bchw->bqhw", embedder(state), pixels.mask_features)
    torch.testing.assert_close(out.mask_logits[-1], wanted, atol=1e-5, rtol=1e-5)
    entity_logits = head.entity_head(state)
    torch.testing.assert_close(out.entity_logits[-1], entity_logits, atol=1e-5, rtol=1e-5)
    assert out.mask_logits[-1].shape[-2:] == (16, 16)
    assert out.entity_logits[0].shape == (2, out.query_valid.shape[1], 2)


@pytest.mark.parametrize("queries", ["learned", "entity"])
def test_initialisation_and_gradients(queries):
    head = build(queries, perturb=False).train()
    attention = head.pixel_decoder.encoder.layers[0].self_attn
    assert attention.sampling_offsets.bias.abs().max() >= 1  # a ring of points, not one
    assert attention.sampling_offsets.weight.abs().max() == 0
    for embedding in (head.pixel_decoder.level_embed, head.transformer.level_embed.weight):
        assert 0.5 < embedding.std() < 2
    mask_mlp = dict(head.transformer.decoder.mask_predictor.mask_embedder.named_parameters())
    assert mask_mlp["0.0.bias"].abs().max() > 0  # as PyTorch draws it, not zero
    weight = head.transformer.decoder.layers[0].fc1.weight  # Xavier's bound, not torch's default
    assert 32**-0.5 < weight.abs().max() <= (6 / (32 + 40)) ** 0.5
    out = head(features(), masks())
    loss = sum(x.square().mean() for x in [*out.mask_logits, *out.entity_logits])
    (loss + out.query_embeddings.sum()).backward()
    assert [name for name, p in head.named_parameters() if p.grad is None] == []
    assert all(torch.isfinite(p.grad).all() for p in head.parameters())


@pytest.mark.parametrize("queries", ["learned", "entity"])
def test_the_pixel_decoder_runs_in_float32_under_autocast(queries):
    head, maps, seen = build(queries), features(), {}
    for name, module in head.named_modules():
        module.register_forward_hook(lambda m, _, out, name=name: seen.update({name: out}))
    with torch.no_grad():
        head(maps, masks())
        exact = dict(seen)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            head(maps, masks())
    inside = [name for name in seen if name.startswith("pixel_decoder.")]
    tensors = [n for n in inside if isinstance(seen[n], torch.Tensor)]
    assert any("sampling_offsets" in n for n in tensors) and len(tensors) > 10
    assert all(torch.equal(seen[name], exact[name]) for name in tensors)
    assert seen["entity_head"].dtype == torch.bfloat16  # the rest is in the precision of autocast


def test_padding_queries_are_invisible_and_a_batch_equals_its_images():
    head, maps, all_masks = build("entity"), features(), masks()
    valid = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    with torch.no_grad():
        out = head(maps, all_masks, valid)
        second = {n: x[1:] for n, x in maps.items()}
        alone = head(second, all_masks[1:, :3])
        seen = head(second, all_masks[1:])  # the two last entities as valid ones
    torch.testing.assert_close(
        alone.query_embeddings, out.query_embeddings[1:, :3], atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(
        alone.mask_logits[-1], out.mask_logits[-1][1:, :3], atol=1e-5, rtol=1e-5
    )
    assert (seen.query_embeddings[:, :3] - alone.query_embeddings).abs().max() > 1e-3
    assert torch.equal(out.query_valid, valid)


def test_a_deep_copy_hides_its_own_padding():
    head = build("entity")
    twin = copy.deepcopy(head)
    valid = torch.tensor([[1, 1, 1, 0, 0]] * 2, dtype=torch.bool)
    with torch.no_grad():
        assert_same(head(features(), masks(), valid), twin(features(), masks(), valid))


def test_entities_without_pixels_and_images_without_entities():
    head, maps, all_masks = build("entity"), features(), masks()
    all_masks[0, 2] = False
    valid = torch.tensor([[1] * 5, [0] * 5], dtype=torch.bool)
    with torch.no_grad():
        out = head(maps, all_masks, valid)
        empty = head(maps, all_masks[:, :0], valid[:, :0])
    assert torch.isfinite(out.query_embeddings).all()
    assert torch.isfinite(out.mask_logits[-1]).all()
    assert empty.query_embeddings.shape == (2, 1, 32) and not empty.query_valid.any()
    assert torch.isfinite(empty.query_embeddings).all()


def test_content_is_the_mean_under_the_mask():
    torch.manual_seed(0)
    module = EntityQueries(in_channels=3, dim=32, shape_size=0)
    values = torch.randn(2, 3)
    maps = values[0].view(1, 3, 1, 1).repeat(1, 1, 16, 16)
    maps[..., 8:] = values[1].view(1, 3, 1, 1)
    left = torch.zeros(1, 3, 64, 64, dtype=torch.bool)
    left[:, 0, :, :32] = True  # only the first value
    left[:, 1, 5:9, 30:34] = True  # half of both, and not aligned with the cells
    content, _, _ = module(maps, left)
    wanted = [values[0], values.mean(0), torch.zeros(3)]
    for k, value in enumerate(wanted):
        torch.testing.assert_close(content[0, k], module.content(value) + module.embedding)


def test_content_sees_the_image_alone_under_the_mask():
    torch.manual_seed(0)
    module = EntityQueries(in_channels=3, dim=32, shape_size=0, image_channels=5)
    maps, image = torch.zeros(1, 3, 16, 16), torch.randn(1, 5, 2, 2)  # a coarser grid
    masks = torch.zeros(1, 3, 64, 64)
    masks[:, 0, :32, :32] = 1  # the first cell
    masks[:, 1, :, 32:] = 1  # the right half
    content, _, _ = module(maps, masks, image)
    base = module.content(torch.zeros(3)) + module.embedding
    for k, mean in enumerate((image[0, :, 0, 0], image[0, :, :, 1].mean(1), torch.zeros(5))):
        torch.testing.assert_close(content[0, k], base + module.image(mean))


def test_position_sees_the_place_at_several_wave_lengths():
    module = EntityQueries(in_channels=3, dim=32, shape_size=0)
    seen = []
    module.position.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    corner = torch.zeros(1, 2, 64, 64)
    corner[0, 0, :16, 32:48] = 1
    corner[0, 1, 32:48, :16] = 1
    module(torch.randn(1, 3, 16, 16), corner)
    (where,) = seen
    angle = 2 * torch.pi * torch.tensor([40 / 64, 8 / 64])  # x and y of the first centroid
    torch.testing.assert_close(where[0, 0, [0, 16]], angle.sin())
    torch.testing.assert_close(where[0, 0, :16], where[0, 1, 16:32])  # x and y change places
    assert where[0, 0, :32].unique().numel() > 20


def test_embeddings_tell_an_entitys_place_and_content_past_the_decoder():
    head = build("entity")
    with torch.no_grad():  # a decoder that says the same of every query
        head.transformer.decoder.layernorm.weight.zero_()
    boxes = torch.zeros(1, 3, 64, 64)
    for k, (y, x) in enumerate(((8, 8), (8, 40), (8, 8))):
        boxes[0, k, y : y + 16, x : x + 16] = 1
    flat = {name: torch.ones_like(x) for name, x in features(batch=1).items()}
    with torch.no_grad():
        place = head(flat, boxes).query_embeddings[0]
        flat["res2"][..., 8:] = -1  # under the second box
        other = head(flat, boxes).query_embeddings[0]
    assert (place[0] - place[1]).abs().max() > 0.1 and torch.equal(place[0], place[2])
    assert torch.equal(place[0], other[0]) and (place[1] - other[1]).abs().max() > 0.1


def test_geometry_of_a_box():
    weights = torch.zeros(1, 2, 20, 40)
    weights[0, 0, 4:8, 10:30] = 1.0
    x, y, spread_x, spread_y, size = mask_geometry(weights)[0, 0].tolist()
    assert (x, y) == pytest.approx((20 / 40, 6 / 20))
    assert spread_x == pytest.approx(((20**2 - 1) / 12) ** 0.5 / 40)
    assert spread_y == pytest.approx(((4**2 - 1) / 12) ** 0.5 / 20)
    assert size == pytest.approx((80 / 800) ** 0.5)
    assert mask_geometry(weights)[0, 1].abs().sum() == 0


def test_crops_show_the_outline_whatever_place_and_size():
    def disk(x, y, radius):
        ys, xs = torch.meshgrid(torch.arange(96.0), torch.arange(96.0), indexing="ij")
        return ((xs - x) ** 2 + (ys - y) ** 2 <= radius**2).float()

    box = torch.zeros(96, 96)
    box[30:60, 30:60] = 1
    stack = torch.stack([disk(30, 30, 16), disk(60, 50, 16), disk(50, 48, 32), box])[None]
    crops = crop_masks(stack, mask_geometry(stack), 16)[0]
    assert (crops[0] - crops[1]).abs().max() < 1e-4  # moved
    assert (crops[0] - crops[2]).abs().mean() < 0.03  # scaled
    assert (crops[0] - crops[3]).abs().mean() > 0.06  # another shape
    assert crops.min() >= 0 and crops.max() <= 1
    half = stack.clone()
    half[..., :48] = 0  # x is the last axis of the crop
    assert crop_masks(half, mask_geometry(stack), 16)[0, 2, :, :7].sum() == 0


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="QUERIES is 'both'"):
        build("both")
    shapes = dict(list(SHAPES.items())[1:])
    with pytest.raises(ValueError, match=r"strides \[8, 16, 32\]"):
        Mask2FormerHead(**{**SIZES, "input_shape": shapes})
    with pytest.raises(ValueError, match="HIDDEN_DIM 40"):
        Mask2FormerHead(**{**SIZES, "hidden_dim": 40})
    head = build("entity")
    with pytest.raises(ValueError, match="got None"):
        head(features())
    with pytest.raises(ValueError, match="B 2"):
        head(features(), masks(batch=3))
    with pytest.raises(ValueError, match=r"entity_valid has shape \(2, 4\)"):
        head(features(), masks(), torch.ones(2, 4, dtype=torch.bool))
