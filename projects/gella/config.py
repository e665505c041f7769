"""Every key that GELLA adds to Detectron2's config, with meaning and unit, and `load_config`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import get_cfg

# Keys whose values are paths of files or folders, besides DATASETS.MODULES and the third part of
# each entry of INPUT.GELLA.ENTITY_SOURCES. Those that are to be written are not sought.
PATHS = (
    "MODEL.WEIGHTS",
    "MODEL.LANGUAGE.TOKENIZER",
    "MODEL.LANGUAGE.CONFIG",
    "MODEL.CLIP.NAME",
    "SOLVER.ZERO.CONFIG",
    "TEST.CALIBRATION",
    "TEST.CATEGORIES_FROM",
)
_CHECKOUT = Path(__file__).resolve().parents[2]  # of a wheel: nothing of this project


def add_gella_config(cfg: Any) -> None:
    """Add GELLA's keys, with the paper's values as defaults, to a Detectron2 config.

    Args:
        cfg: a ``detectron2.config.CfgNode`` made by ``get_cfg()``; changed in place. A key that is
            not defined here or in Detectron2 is refused when a file or the command line sets it.

    Sections: ``MODEL.*`` one node per box of the paper's Figure 2, ``INPUT.GELLA`` the geometry and
    the colours, ``DATALOADER.TASK_RATIOS`` Table 9, ``SOLVER.*_MULTIPLIER`` the learning rates.
    """
    node = type(cfg)
    cfg.MODEL.META_ARCHITECTURE = "GELLA"  # a name in META_ARCH_REGISTRY, or "ClipGrounder"
    _add_encoders(cfg, node)
    _add_mask_decoder(cfg, node)
    _add_language(cfg, node)
    _add_association(cfg, node)
    _add_clip(cfg, node)
    _add_inference(cfg, node)
    _add_data(cfg, node)
    _add_training(cfg, node)
    _add_watching(cfg, node)


def _add_encoders(cfg: Any, node: type) -> None:
    # The colormap is RGB in 0..255; these are ImageNet's statistics in RGB order.
    cfg.MODEL.PIXEL_MEAN = [123.675, 116.280, 103.530]
    cfg.MODEL.PIXEL_STD = [58.395, 57.120, 57.375]

    cfg.MODEL.BACKBONE.NAME = "TimmColormapEncoder"  # a name in BACKBONE_REGISTRY (eq. 1)
    encoder = cfg.MODEL.COLORMAP_ENCODER = node()
    # A timm model with `features_only` at strides 4, 8, 16, 32 (eq. 1).
    encoder.ARCH = "swin_tiny_patch4_window7_224"

    clip = cfg.MODEL.IMAGE_ENCODER = node()
    clip.NAME = "CLIPImageEncoder"  # a name in BACKBONE_REGISTRY (eq. 2)
    clip.IMAGE_SIZE = 336  # pixels; CLIP's own input side
    clip.PATCH_SIZE = 14  # pixels; the grid has (IMAGE_SIZE / PATCH_SIZE)^2 cells
    clip.WIDTH = 1024  # channels of Z_v
    clip.LAYERS = 24  # transformer layers
    clip.HEAD_WIDTH = 64  # channels of an attention head
    clip.MLP_RATIO = 4.0  # feed-forward channels over WIDTH
    # OpenAI's weights need quick GELU; the plain one is silently wrong by 2e-2.
    clip.QUICK_GELU = True
    # "patch": CLIP's one strided convolution. "conv": strided 3x3 convolutions of the same total
    # stride, for training from scratch on few images.
    clip.STEM = "patch"
    clip.FREEZE = True  # LLaVA-1.5 keeps CLIP frozen
    clip.PIXEL_MEAN = [122.7709383, 116.7460125, 104.09373615]  # RGB, 0..255
    clip.PIXEL_STD = [68.5005327, 66.6321579, 70.32316305]  # RGB, 0..255

    blend = cfg.MODEL.RESOBLEND = node()
    # "image_query": eq. 7-8 to the letter; "image_query_mask_residual": the projected z^s is added
    # after the upsampling; "mask_query": z^s asks, the image tokens answer, residual z^s.
    blend.FUSION = "mask_query"
    blend.DIM = 256  # channels of the attention and of every output level
    blend.NUM_HEADS = 8  # of both attentions
    blend.FFN_RATIO = 4.0  # feed-forward channels over DIM
    # Table 7's parts: self-attention, cross-attention, feed-forward, residual Z_v, convolution.
    blend.SELF_ATTENTION = True
    blend.CROSS_ATTENTION = True
    blend.FEED_FORWARD = True
    blend.RESIDUAL = True
    blend.CONVOLUTION = True
    # A fixed sine embedding on queries and keys of both attentions; z^s has no position of its own.
    blend.POSITION = True


def _add_mask_decoder(cfg: Any, node: type) -> None:
    # "Mask2FormerHead", ours over transformers, or "MaskFormerHead", upstream's own: its repository
    # on PYTHONPATH, learned queries only.
    cfg.MODEL.SEM_SEG_HEAD.NAME = "Mask2FormerHead"
    cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES = ["res2", "res3", "res4", "res5"]  # strides 4 to 32
    decoder = cfg.MODEL.MASK_DECODER = node()
    # "learned": Mask2Former's queries and Hungarian matching; "entity": one query per input entity.
    decoder.QUERIES = "learned"
    decoder.NUM_QUERIES = 100  # used by "learned" only
    # "entity" only: the query also sees its mask, cropped to the entity and sampled at this many
    # cells per side; 0 leaves it out.
    decoder.ENTITY_SHAPE_SIZE = 16
    # "entity" only: the query also sees the image's own grid under its mask, which ResoBlend gives
    # beside the levels. In these, what an entity looks like is hidden by the colours of the masks.
    decoder.ENTITY_IMAGE = True
    decoder.HIDDEN_DIM = 256  # channels of E_vc; a multiple of 32
    decoder.MASK_DIM = 256  # channels of the mask features
    decoder.NUM_HEADS = 8  # of every attention
    decoder.ENCODER_LAYERS = 6  # deformable attention layers of the pixel decoder
    decoder.ENCODER_FFN_DIM = 1024  # their feed-forward channels
    decoder.DECODER_LAYERS = 9  # transformer decoder layers actually built
    decoder.DECODER_FFN_DIM = 2048  # their feed-forward channels
    decoder.ENTITY_WEIGHT = 2.0  # of entity or no object, eq. 6; Mask2Former's defaults
    decoder.MASK_WEIGHT = 5.0  # of the points' cross-entropy, eq. 6
    decoder.DICE_WEIGHT = 5.0  # of the dice loss, eq. 6
    decoder.NO_OBJECT_WEIGHT = 0.1  # of queries without an entity in that loss
    decoder.DEEP_SUPERVISION = True  # the losses of eq. 6 after every decoder layer
    decoder.TRAIN_NUM_POINTS = 12544  # points sampled per mask: 112 x 112
    decoder.OVERSAMPLE_RATIO = 3.0  # candidates per point
    decoder.IMPORTANCE_SAMPLE_RATIO = 0.75  # share of points where the mask is unsure


def _add_language(cfg: Any, node: type) -> None:
    language = cfg.MODEL.LANGUAGE = node()
    # A directory (or hub name) that transformers' AutoTokenizer reads. <SEG> is added to it.
    language.TOKENIZER = ""
    # A folder with transformers' config.json of any causal language model (LLaMA, Qwen2, Mistral,
    # Phi, ...; of LLaVA its language part), which replaces the size keys from HIDDEN_SIZE to
    # INIT_STD. Weights come from MODEL.WEIGHTS, never from this folder.
    language.CONFIG = ""
    language.VOCAB_SIZE = 32001  # rows of the embedding: LLaMA's 32,000 and <SEG>
    language.HIDDEN_SIZE = 4096  # channels of E_vl
    language.INTERMEDIATE_SIZE = 11008  # feed-forward channels
    language.NUM_LAYERS = 32  # transformer layers
    language.NUM_HEADS = 32  # of the queries
    language.NUM_KEY_VALUE_HEADS = 32  # fewer than NUM_HEADS: heads share keys and values
    language.RMS_NORM_EPS = 1e-5  # of all norms
    language.ROPE_THETA = 10000.0  # base of the rotary positions
    # One matrix for word embedding and output layer. LLaMA has two; a small decoder trained from
    # scratch learns to copy the caption's words sooner with one.
    language.TIE_EMBEDDINGS = False
    # Standard deviation of the initial weights. LLaMA's 0.02 suits a width of 4,096
    # (1.28 / sqrt(width)); a narrow decoder needs more or its attention starts out uniform.
    language.INIT_STD = 0.02
    # The longest prompt with its answer in tokens, image tokens included; answers end there.
    language.MAX_POSITIONS = 4096
    # "sdpa" (PyTorch's fused attention), "flash_attention_2" (needs flash-attn and half precision)
    # or "eager".
    language.ATTENTION = "sdpa"
    # Of the parameters: "float32", "bfloat16" or "float16". Training in float32 with SOLVER.AMP, or
    # through ZeRO, keeps small steps; half precision halves the memory of inference and of LoRA.
    # With ZeRO and SOLVER.AMP weights are loaded in bfloat16 whatever this says, as they train.
    language.DTYPE = "float32"
    # In training keep the input of each layer only and compute the rest again: less memory, a third
    # more time.
    language.GRADIENT_CHECKPOINTING = False
    language.PROJECTOR = "mlp2x_gelu"  # eq. 3: "mlp2x_gelu" (LLaVA-1.5) or "linear" (the paper)
    # CLIP's grid is average-pooled by this factor per side before it becomes tokens; 1 keeps all.
    language.IMAGE_TOKEN_STRIDE = 1
    # What a prompt begins with; LLaVA-1.5's words.
    language.SYSTEM = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    language.ANSWER_WEIGHT = 1.0  # of L_ans, eq. 10
    language.MAX_NEW_TOKENS = 512  # longest answer, in tokens
    # Prompt lookup: noun extraction of a single caption drafts up to this many tokens at a time by
    # copying from the prompt, and checks them in one pass: the same answer in fewer passes. 0: off.
    language.PROMPT_LOOKUP_TOKENS = 10
    # "8bit" or "4bit" rounds the weights of the linear layers (bitsandbytes) when the model is
    # first used, after loading; for inference, or for training LoRA in one process.
    language.QUANTIZATION = ""
    _add_lora(language, node)


def _add_association(cfg: Any, node: type) -> None:
    association = cfg.MODEL.ASSOCIATION = node()
    association.DIM = 256  # channels in which nouns and entities meet (eq. 9)
    association.STRUCTURE = "fc"  # "fc" or "fc_relu_fc" (Table 10)
    # Multiply the dot product by a learned scale (starting at 1/sqrt(DIM)) and add a learned bias
    # (starting at BIAS_INIT). False is eq. 9 to the letter.
    association.CALIBRATED = True
    association.BIAS_INIT = -1.5
    association.WEIGHT = 1.0  # of L_asso, eq. 10
    # A caption counts in L_asso by its nouns over this number, the mean of PNG's, as average recall
    # counts nouns. Lists of categories and expressions count as one; 0: captions too.
    association.CAPTION_NOUNS = 5.0


def _add_lora(language: Any, node: type) -> None:
    # Low-rank adapters (peft) instead of full fine-tuning. To start from weights without adapters:
    # MODEL.WEIGHTS_ALLOW_MISSING "['*.lora_*']".
    lora = language.LORA = node()
    lora.ENABLED = False
    lora.RANK = 128  # channels of an adapter
    lora.ALPHA = 256  # adapters are scaled by ALPHA / RANK
    lora.DROPOUT = 0.05  # probability, before an adapter
    lora.TARGETS = [  # last names of linear layers
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]
    lora.TRAIN_EMBEDDINGS = True  # input embedding and output layer too, where <SEG> is new


def _add_clip(cfg: Any, node: type) -> None:
    # Of "ClipGrounder", which scores without training. None of these defaults was chosen by a
    # measurement of ours: each is the usual value or the simplest.
    clip = cfg.MODEL.CLIP = node()
    # A folder as transformers saves a CLIP, or its name on the hub: where MODEL.WEIGHTS and
    # MODEL.LANGUAGE.TOKENIZER are empty, they become that folder.
    clip.NAME = ""
    # Pixels; the longest side at which the picture's own grid is computed. 448 is usual for dense
    # features: with patches of 16, four times the cells of CLIP's own 224.
    clip.DENSE_SIZE = 448
    # Share of an entity's longest side that its crop shows around it, on each side: CLIP knows
    # photographs, in which things have surroundings.
    clip.CROP_PADDING = 0.1
    # A score is CROP_WEIGHT x cosine of the crop + (1 - CROP_WEIGHT) x cosine of what is pooled
    # under the mask. A crop is what CLIP was trained on; the grid sees the whole scene.
    clip.CROP_WEIGHT = 0.5
    # What cosines are multiplied by before the softmax; 0: CLIP's own, which it learned (100).
    clip.LOGIT_SCALE = 0.0
    clip.TEMPLATE = "a photo of {}."  # what CLIP reads; the noun stands for {}
    # The spaCy pipeline that finds the nouns of a caption where none are given.
    clip.CHUNKER = "en_core_web_sm"


def _add_inference(cfg: Any, node: type) -> None:
    gella = cfg.MODEL.GELLA = node()
    # A query whose mask meets an input entity with an IoU of at least SNAP_IOU returns the entity's
    # own full-resolution mask; an entity query always returns its own.
    gella.SNAP = True
    gella.SNAP_IOU = 0.5
    gella.ENTITY_SCORE_THRESHOLD = 0.5  # learned queries below this probability are no entities
    # A noun takes every entity whose association probability exceeds this, and always the best one.
    # tools/calibrate.py picks this key and the next three on a validation split.
    gella.ASSOCIATION_THRESHOLD = 0.5
    # A noun in the singular, by its words alone ("a dog", not "two dogs"), takes its best entity
    # only.
    gella.SINGULAR_ARGMAX = False
    # A noun whose best entity scores lower takes none at all: an expression without a target.
    gella.NONE_THRESHOLD = 0.0
    # Panoptic: entities whose best category scores lower are left void.
    gella.PANOPTIC_THRESHOLD = 0.0
    # Noun extraction copies spans of the caption: no other noun can be generated, and its place is
    # known. False: answers are free, and their nouns are sought in the caption.
    gella.COPY_NOUNS = True
    test = cfg.TEST
    # Nouns of narratives at test: "given" (all in one pass of the language model) or "extracted"
    # (the model generates them; they are matched to the reference by their text).
    test.NOUNS = "given"
    # Draws of the entities' colours in evaluation and predictor: a noun's probability is the mean
    # over them, each a pass of colormap encoder, ResoBlend and mask decoder. Above 1: for entity
    # queries and other colours than "location"; not with ClipGrounder, which looks at none.
    test.COLOR_DRAWS = 1
    # Other names for the categories of a panoptic dataset: a registered dataset, or a JSON file
    # (docs/EVALUATION.md). "": the dataset's own names.
    test.CATEGORIES_FROM = ""
    # The file that tools/calibrate.py wrote for these weights: its thresholds replace those of
    # MODEL.GELLA, and results.json says where they were picked.
    test.CALIBRATION = ""
    # Also run Detectron2's COCOPanopticEvaluator; needs the full Detectron2 and panopticapi.
    test.DETECTRON2_PANOPTIC = False
    # Train without MODEL.WEIGHTS, from random ones: right for the synthetic shapes. A model of the
    # paper's size that starts so learns nothing, and CLIP would stay random for ever.
    cfg.MODEL.FROM_SCRATCH = False
    # Models on the Hugging Face hub, as owner/name@commit (without a commit: what main is then, ""
    # for none), that `tools/convert_weights.py --from-hub` makes the first weights of.
    hub = cfg.MODEL.HUB = node()
    hub.LLAVA = ""  # LLaVA-1.5 in transformers' layout, which holds its CLIP
    hub.CLIP = ""  # instead of LLaVA's
    hub.MASK2FORMER = ""  # mask decoder, and colormap encoder
    hub.COLORMAP_ENCODER = ""  # instead of Mask2Former's backbone
    hub.TOKENIZER = ""  # of the original LLaVA-1.5: transformers' copy has two more words
    # Checkpoint keys (shell patterns) that may be absent from the file or be left over in it.
    cfg.MODEL.WEIGHTS_ALLOW_MISSING = []
    cfg.MODEL.WEIGHTS_ALLOW_UNEXPECTED = []


def _add_data(cfg: Any, node: type) -> None:
    cfg.INPUT.FORMAT = "RGB"  # order of the channels of images as they are read
    # Section 4 has resizing and padding alone; "horizontal" mirrors half of the training images.
    cfg.INPUT.RANDOM_FLIP = "none"
    gella = cfg.INPUT.GELLA = node()
    gella.COLORMAP_SIZE = 896  # pixels; the padded square side of the colormap. Swin: n x 224
    gella.COLORS = "random"  # "random", "location" (Table 5b) or "separated"
    # Where the input entities come from: [dataset name or shell pattern, kind, path] each, the
    # first that fits counts; datasets without one use their annotation. Kinds: "auto" and the
    # formats of gella/entities/files.py (one .json, or a folder with a file per image),
    # "annotation".
    # On the command line: INPUT.GELLA.ENTITY_SOURCES "[['gella_*_val', 'auto', 'masks.json']]"
    gella.ENTITY_SOURCES = []
    # Training images that their source has no masks of are left out, with a warning, instead of
    # being an error. Evaluation needs masks of every image.
    gella.LEAVE_OUT_MISSING = False
    # Segments that an input entity must overlap at this IoU to become a phrase's target. Counts
    # where the entities do not come from the annotation.
    gella.TARGET_IOU = 0.5
    # Mirrored views (INPUT.RANDOM_FLIP) of captions that say left or right: "swap" exchanges the
    # words, though "right behind" becomes "left behind"; "skip" does not mirror these images.
    gella.FLIP_TEXT = "skip"
    # Absent category names listed with the present ones when a panoptic image trains grounding;
    # -1 lists every category, as every test does.
    gella.PANOPTIC_NEGATIVES = 20
    # A caption whose prompt has more than MODEL.LANGUAGE.MAX_POSITIONS tokens: "error" names both
    # numbers; "cut" shortens it behind the last noun that fits (a description, and a caption whose
    # nouns are to be extracted: at the end of a sentence). Cut nouns are counted and logged, and
    # evaluation scores them as not found.
    gella.OVERLONG_CAPTION = "error"

    # Python files and importable modules that are imported before anything is looked up, to
    # register datasets or parts of a model. Their code is run.
    cfg.DATASETS.MODULES = ()
    # Leave the val and test images of RefCOCO, RefCOCO+ and RefCOCOg (all splits whose refs are on
    # disk) out of the training datasets over COCO train2017, in which they all lie.
    cfg.DATASETS.EXCLUDE_REFCOCO_VAL_TEST = False

    # Shares of describing, noun extraction and grounding (Table 9). One task per iteration, the
    # same on every rank.
    cfg.DATALOADER.TASK_RATIOS = [0.2, 0.2, 0.6]
    # An iteration is of one dataset too: [dataset name or shell pattern, share] each, the first
    # that fits counts, of the iterations of every task that the dataset has records of; datasets
    # without one have a share of 1. []: the shares are the numbers of these records.
    cfg.DATALOADER.DATASET_RATIOS = []
    # Captions of one image, or expressions about it, that a grounding iteration asks together: the
    # vision side, most of a small model's step and 1 % of the paper's, runs once for all of them.
    cfg.DATALOADER.PROMPTS_PER_IMAGE = 1


def _add_training(cfg: Any, node: type) -> None:
    cfg.register_deprecated_key("SOLVER.OPTIMIZER")  # in config.yaml of older runs; always AdamW
    cfg.SOLVER.BETAS = [0.9, 0.999]  # decay of Adam's two running means
    # Learning rate of a group = BASE_LR x its multiplier, throughout warm-up and decay. Heads are
    # the parts without public pretrained weights: ResoBlend, association, entity head and queries.
    cfg.SOLVER.LANGUAGE_MULTIPLIER = 1.0
    cfg.SOLVER.VISION_MULTIPLIER = 1.0
    cfg.SOLVER.HEADS_MULTIPLIER = 1.0
    # An iteration is one optimiser step on IMS_PER_BATCH images over all processes. Each process
    # takes its share in this many forward and backward passes: less memory, the same step.
    cfg.SOLVER.ACCUMULATE = 1
    # Above 0, MAX_ITER and STEPS are computed, and setting them to anything else is an error: an
    # epoch is EPOCH_SIZE images, or with 0 as many as DATASETS.TRAIN has records, whichever task
    # each is drawn for. To try a few iterations: SOLVER.EPOCHS 0 SOLVER.MAX_ITER 2.
    cfg.SOLVER.EPOCHS = 0
    cfg.SOLVER.STEP_EPOCHS = (46, 48)  # the rate is multiplied by GAMMA after these epochs
    cfg.SOLVER.EPOCH_SIZE = 0  # images; 0: as many as DATASETS.TRAIN has records
    # A DeepSpeed JSON file, such as configs/zero/stage2.json: the language decoder trains under
    # ZeRO, the rest as always. "": plain training.
    cfg.SOLVER.ZERO = node()
    cfg.SOLVER.ZERO.CONFIG = ""
    # Checkpoints to resume from (OUTPUT_DIR/checkpoints/iter_*), of which SOLVER.CHECKPOINT_PERIOD
    # writes one: this many newest ones are kept, 0 keeps all; besides these the ones after every
    # CHECKPOINT_KEEP_EVERY iterations, 0 none.
    cfg.SOLVER.CHECKPOINT_KEEP = 3
    cfg.SOLVER.CHECKPOINT_KEEP_EVERY = 0
    # "per_side": the norm of the language decoder's gradient is limited to LANGUAGE_VALUE, that of
    # all other parts' to CLIP_VALUE; "full_model": their joint norm to CLIP_VALUE; also "norm" and
    # "value", of each parameter and number.
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = "per_side"
    cfg.SOLVER.CLIP_GRADIENTS.LANGUAGE_VALUE = 1.0  # a norm; LLaVA's limit
    # Images per forward pass of each process at test; does not change the results.
    cfg.TEST.IMS_PER_BATCH = 1
    # Images per dataset, evenly spaced over it, in the evaluations of every TEST.EVAL_PERIOD
    # iterations; 0 takes all. The final evaluation and --eval-only always take all.
    cfg.TEST.SUBSET = 0
    # "task/metric", such as "png/AR": the checkpoint model_best has the best score so far in these
    # evaluations. "" keeps none. BEST_MODE: "max" or "min".
    cfg.TEST.BEST_METRIC = ""
    cfg.TEST.BEST_MODE = "max"
    # Rule of PNG's average recall: "hard", "official" or "flmm"; rows of two rules do not compare.
    cfg.TEST.PNG_PROTOCOL = "hard"


def _add_watching(cfg: Any, node: type) -> None:
    # VIS_PERIOD (Detectron2's own key): every so many iterations a picture of one training sample
    # goes to TensorBoard, with its truth and the model's answer; 0: none.

    # What happens when a loss or a gradient is NaN or infinite on any rank: "stop" ends the run at
    # once; "skip" leaves the parameters as they are and goes on. The images concerned are listed in
    # OUTPUT_DIR/nonfinite_<iteration>.json.
    cfg.SOLVER.NONFINITE = "stop"
    # Steps that "skip" may leave out in the whole run, resumed parts included.
    cfg.SOLVER.NONFINITE_LIMIT = 10


def load_config(config_file: str | Path, opts: Sequence[str] = ()) -> Any:
    """Read a GELLA config file and apply ``KEY VALUE`` overrides; the result can still be changed.

    A relative path (`PATHS`, ``DATASETS.MODULES``, ``INPUT.GELLA.ENTITY_SOURCES``) of the file is
    sought beside the file, then from the working directory, one of an override the other way round;
    then in the checkout of this project. Before all, what begins with ``datasets/`` is sought in
    ``$DETECTRON2_DATASETS``. A path that is nowhere stays as it is. Of a folder of weights, such as
    a run's, a checkpoint's or one of ``tools/convert_weights.py``, the config is its
    ``config.yaml``, and the weights are its own.

    Raises:
        FileNotFoundError: there is no such file, or a ``_BASE_`` of it is missing.
        ValueError: no file is named, it is no YAML, or a key is unknown or of another type.
    """
    if not config_file:
        raise ValueError("--config-file is missing; see the folder configs/")
    folder, config_file = Path(config_file), find_config(config_file)
    if not config_file.is_file():
        raise FileNotFoundError(f"config {config_file} does not exist; see the folder configs/")
    cfg = get_cfg()
    add_gella_config(cfg)
    # yacs reports unknown keys by KeyError in files but by AssertionError in overrides, and YAML
    # errors have types of their own.
    try:
        cfg.merge_from_file(str(config_file))
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"config {config_file}: {_one_line(error)}") from error
    beside = str(config_file.parent)
    _find_paths(cfg, (beside, ""))
    own = cfg.MODEL.WEIGHTS and Path(cfg.MODEL.WEIGHTS).parent == config_file.parent
    if config_file.name != folder.name and not own:
        # A run's config names the weights that it began with.
        final = config_file.with_name("model_final.pth")
        cfg.MODEL.WEIGHTS = str(final) if final.is_file() else beside
    try:
        cfg.merge_from_list(list(opts))
    except Exception as error:
        raise ValueError(f"config override: {_one_line(error)}") from error
    _find_paths(cfg, ("", beside))
    return cfg


def find_config(config_file: str | Path) -> Path:
    """The file that `load_config` reads: sought here, then in the checkout; of a folder the
    ``config.yaml`` in it."""
    here = Path(config_file)
    found = here if here.exists() or not (_CHECKOUT / here).exists() else _CHECKOUT / here
    return found / "config.yaml" if found.is_dir() else found


def _find_paths(cfg: Any, folders: Sequence[str]) -> None:
    def find(path: str) -> str:
        root = os.path.expanduser(os.getenv("DETECTRON2_DATASETS", ""))  # as Detectron2 does
        rest = path.removeprefix("datasets/")
        inside = [os.path.join(root, rest)] if root and rest != path else []
        places = (*inside, *(os.path.join(folder, path) for folder in (*folders, str(_CHECKOUT))))
        return next((place for place in places if path and os.path.exists(place)), path)

    for key in PATHS:
        node, *names = cfg, *key.split(".")
        for name in names[:-1]:
            node = node[name]
        node[names[-1]] = find(node[names[-1]])
    # "package.module" is no path
    modules = (str(name) for name in cfg.DATASETS.MODULES)
    cfg.DATASETS.MODULES = tuple(find(m) if m.endswith(".py") or "/" in m else m for m in modules)
    sources = cfg.INPUT.GELLA.ENTITY_SOURCES
    if all(isinstance(e, (list, tuple)) and len(e) == 3 for e in sources):  # else refused when read
        cfg.INPUT.GELLA.ENTITY_SOURCES = [[*e[:2], find(str(e[2]))] for e in sources]


def _one_line(error: BaseException) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()) or type(error).__name__
