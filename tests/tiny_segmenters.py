"""Tiny segmenters with random weights, saved as their libraries save them; shared by tests."""

import torch
import transformers as hf
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Instances
from torch import nn


def save_sam(folder):
    """A SAM of 64-pixel input, as `save_pretrained` writes it, processor included."""
    torch.manual_seed(0)
    small = {"hidden_size": 16, "image_size": 64, "patch_size": 8}
    one = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 16}
    vision = {**small, **one, "output_channels": 16, "num_pos_feats": 8, "window_size": 4}
    config = hf.SamConfig(
        vision_config=hf.SamVisionConfig(**vision, global_attn_indexes=[0]).to_dict(),
        prompt_encoder_config=hf.SamPromptEncoderConfig(**small, mask_input_channels=4).to_dict(),
        mask_decoder_config=hf.SamMaskDecoderConfig(**one, iou_head_hidden_dim=8).to_dict(),
    )
    scattered(hf.SamModel(config)).save_pretrained(folder)
    size = {"size": {"longest_edge": 64}, "mask_size": {"longest_edge": 16}}
    pad = {"pad_size": square(64), "mask_pad_size": square(16)}
    hf.SamProcessor(hf.SamImageProcessor(**size, **pad)).save_pretrained(folder)
    return folder


def save_sam2(folder):
    """A SAM 2 of 128-pixel input; its processor squashes images to a square."""
    torch.manual_seed(0)
    levels = {"embed_dim_per_stage": [8, 16, 32, 64], "window_size_per_stage": [4] * 4}
    levels |= {"blocks_per_stage": [1] * 4, "num_attention_heads_per_stage": [1, 1, 2, 2]}
    hiera = hf.Sam2HieraDetConfig(
        hidden_size=8, image_size=[128, 128], global_attention_blocks=[], **levels
    )
    vision = hf.Sam2VisionConfig(
        backbone_config=hiera.to_dict(),
        backbone_channel_list=[64, 32, 16, 8],
        backbone_feature_sizes=[[32, 32], [16, 16], [8, 8]],
        fpn_hidden_size=16,
    )
    prompt = hf.Sam2PromptEncoderConfig(hidden_size=16, image_size=128, mask_input_channels=4)
    one = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 16}
    decoder = hf.Sam2MaskDecoderConfig(**one, iou_head_hidden_dim=8)
    config = hf.Sam2Config(
        vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder
    )
    scattered(hf.Sam2Model(config)).save_pretrained(folder)
    hf.Sam2ImageProcessor(size=square(128), mask_size=square(32)).save_pretrained(folder)
    return folder


def save_sam3(folder):
    """A whole SAM 3 of 112-pixel input as on the hub: the detector, and the tracker's own parts."""
    torch.manual_seed(0)
    few = {"hidden_size": 16, "num_attention_heads": 2}
    layer = {**few, "num_layers": 1, "intermediate_size": 16}
    sides = {"image_size": 112, "pretrain_image_size": 56, "window_size": 4}
    vit = {**few, **sides, "intermediate_size": 16, "num_hidden_layers": 1}
    vision = hf.Sam3VisionConfig(
        backbone_config=hf.Sam3ViTConfig(**vit, global_attn_indexes=[0]), fpn_hidden_size=16
    )
    text = {**few, "vocab_size": 50, "intermediate_size": 16, "num_hidden_layers": 1}
    detector = hf.Sam3Config(
        vision_config=vision,
        text_config={**text, "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1},
        geometry_encoder_config=layer,
        detr_encoder_config=layer,
        detr_decoder_config=layer,
        mask_decoder_config=few,
    )
    memory = ("memory_attention_hidden_size", "memory_encoder_hidden_size")
    memory += ("memory_fuser_embed_dim", "mask_downsampler_embed_dim")
    tracker = hf.Sam3TrackerVideoConfig(
        vision_config=vision,
        prompt_encoder_config={"hidden_size": 16, "mask_input_channels": 4},
        mask_decoder_config={**few, "num_hidden_layers": 1, "mlp_dim": 16},
        image_size=112,
        **dict.fromkeys(memory, 16),
        memory_encoder_output_channels=8,
    )
    config = hf.Sam3VideoConfig(detector_config=detector, tracker_config=tracker)
    # Saved otherwise, transformers 5.23 gives the tracker's weights their prefix twice.
    scattered(hf.Sam3VideoModel(config)).save_pretrained(folder, save_original_format=False)
    hf.Sam3ImageProcessor(size=square(112), mask_size=square(32)).save_pretrained(folder)
    return folder


def square(side):
    return {"height": side, "width": side}


def scattered(model):
    """The model with its weights spread; at the initial scale every mask is one flat value."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.5)
    return model


def save_mask2former(folder):
    """A Mask2Former of a few thousand weights over a tiny Swin, processor included."""
    torch.manual_seed(0)
    levels = {"depths": [1] * 4, "num_heads": [1, 1, 2, 2]}
    levels["out_features"] = [f"stage{level}" for level in (1, 2, 3, 4)]
    swin = hf.SwinConfig(image_size=64, patch_size=4, embed_dim=8, window_size=4, **levels)
    sizes = ("feature_size", "mask_feature_size", "hidden_dim", "dim_feedforward")
    few = {"encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2, "num_queries": 8}
    config = hf.Mask2FormerConfig(
        backbone_config=swin,
        **dict.fromkeys((*sizes, "encoder_feedforward_dim"), 32),
        **few,
        num_labels=5,
    )
    model = hf.Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.weight.normal_(0, 1.0)
        for name, weight in model.named_parameters():  # transformers 5.20 starts these near 0
            if "mask_embedder" in name or "queries_" in name:
                weight.normal_(0, 0.2)
    model.save_pretrained(folder)
    size = {"shortest_edge": 64, "longest_edge": 128}
    hf.Mask2FormerImageProcessor(size=size, size_divisor=32).save_pretrained(folder)
    return folder


def save_eomt(folder, dinov3=False, **processor):
    """An EoMT of 64-pixel input; its processor pads images to a square unless told otherwise."""
    torch.manual_seed(0)
    kind = "EomtDinov3" if dinov3 else "Eomt"
    few = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_blocks": 1, "num_queries": 8}
    config = getattr(hf, f"{kind}Config")(hidden_size=32, image_size=64, num_labels=5, **few)
    scattered(getattr(hf, f"{kind}ForUniversalSegmentation")(config)).save_pretrained(folder)
    size = {"shortest_edge": 64, "longest_edge": 64}
    hf.EomtImageProcessor(**{"size": size, "do_pad": True, **processor}).save_pretrained(folder)
    return folder


@META_ARCH_REGISTRY.register()
class ToyColorSegmenter(nn.Module):
    """Finds the reddish and the bluish pixels of its input; its weights say how reddish, bluish."""

    def __init__(self, cfg):
        super().__init__()
        self.levels = nn.Parameter(torch.full((2,), 1000.0))  # finds nothing until it is loaded
        self.rgb = cfg.INPUT.FORMAT == "RGB"
        self.panoptic = bool(cfg.get("TOY_PANOPTIC", False))
        self.seen = []

    def forward(self, inputs):
        return [self.find(entry) for entry in inputs]

    def find(self, entry):
        size = (entry["height"], entry["width"])
        self.seen.append((*entry["image"].shape[-2:], *size))
        red, blue = entry["image"][[0, 2] if self.rgb else [2, 0]]
        maps = torch.stack([red, blue]) > self.levels[:, None, None]
        full = nn.functional.interpolate(maps[None].float(), size=size)[0] > 0.5
        present, scores = full.flatten(1).any(1), torch.tensor([0.9, 0.6])
        found = Instances(size, pred_masks=full[present], scores=scores[present])
        answer = {"instances": found}
        if self.panoptic:
            ids = (full * torch.tensor([7, 9])[:, None, None]).amax(0)
            segments = [{"id": i, "category_id": 0} for i in (7, 9) if bool((ids == i).any())]
            answer["panoptic_seg"] = (ids, segments)
        return answer


def add_toy_config(cfg):
    """Add the key of `ToyColorSegmenter` to a Detectron2 config."""
    cfg.TOY_PANOPTIC = False


def save_toy(folder, *lines):
    """Config and weights of a `ToyColorSegmenter` in `folder`; returns its spec."""
    folder.mkdir(parents=True, exist_ok=True)
    text = ["MODEL:", "  META_ARCHITECTURE: ToyColorSegmenter", "INPUT:", "  MIN_SIZE_TEST: 0"]
    (folder / "toy.yaml").write_text("\n".join([*text, *lines, ""]))
    torch.save({"model": {"levels": torch.tensor([128.0, 128.0])}}, folder / "toy.pth")
    return f"detectron2:{folder / 'toy.yaml'}:{folder / 'toy.pth'}"
