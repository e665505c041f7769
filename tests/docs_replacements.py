"""What the tests of the documentation change in its commands before they run them, and why.

Everything that is not in this table runs as the page has it, in the folder of docs_sandbox.py,
where small files stand under the names of large ones.
"""

from __future__ import annotations

from typing import NamedTuple


class Replacement(NamedTuple):
    """One change of the code blocks of a page.

    Attributes:
        page: path from the root, "*" for all pages, or Makefile.
        old: text that must occur in a block of the page (of some page for "*").
        new: text in its place. ``@CHAT@`` is the address of a chat endpoint on this machine,
            ``@PORT@`` a free port.
        why: what a test does not have.
    """

    page: str
    old: str
    new: str
    why: str


TOY_SETUP = "setup=tiny_segmenters:add_toy_config"
PANOPTIC = "transformers:facebook/mask2former-swin-large-coco-panoptic"
INSTANCE = "transformers:facebook/mask2former-swin-large-coco-instance"
HUB = "no network: a random model of the same kind"
GPUS = "no GPUs; tests/test_launching.py starts several processes in every way"
OWN = "a name that stands for the reader's own"
SHORT = "two steps show that it runs"
SERVER = "a server that nobody stops: it is asked for its page once"
UNSURE = "a trained SAM: the random one is sure of nothing"
RANDOM = " || test $? -eq 1"  # after a command whose random weights cannot succeed

REPLACEMENTS = (
    Replacement("*", " --num-gpus 8", "", GPUS),
    Replacement("*", "sam:facebook/sam-vit-huge", "sam:models/sam", HUB),
    Replacement("*", PANOPTIC, "transformers:models/mask2former", HUB),
    Replacement("*", INSTANCE, "transformers:models/mask2former", HUB),
    Replacement("*", "https://host/v1", "@CHAT@", "a chat endpoint of one's own"),
    Replacement("*", "GELLA_API_KEY=...", "GELLA_API_KEY=none", "a key"),
    Replacement("README.md", "prepare_shapes.py\n", "prepare_shapes.py --train 6 --val 4\n", SHORT),
    Replacement("README.md", "SOLVER.MAX_ITER 3000", "SOLVER.MAX_ITER 3", SHORT),
    Replacement("*", "python tools/app.py", "python tests/docs_serve.py tools/app.py", SERVER),
    Replacement(
        "Makefile", "python tools/app.py", "python tests/docs_serve.py tools/app.py", SERVER
    ),
    Replacement("Makefile", "--train 0\n", "--train 0 --val 4\n", SHORT),
    Replacement("Makefile", "prepare_shapes.py\n", "prepare_shapes.py --train 6 --val 4\n", SHORT),
    Replacement("Makefile", "-n 2 tests", "tests/test_prompts.py", "this test is one of them"),
    Replacement(
        "docs/ANALYSIS.md",
        "benchmark.py eval",
        "benchmark.py eval --images 2 --size 96x64 --recall-nouns 100 --grid 4 --layers 1 "
        "--width 64 --vocabulary 640 --repeat 1",
        "minutes: all of it, of small things",
    ),
    Replacement(
        "docs/CAPTIONS.md",
        "--device cuda --dtype float16 \\\n    --input images --output captions.jsonl",
        "--max-tokens 4 --answer-attempts 1 --limit 1 --input images --output none.jsonl" + RANDOM,
        "a GPU, and a LLaVA that describes",
    ),
    Replacement(
        "docs/APP.md",
        "--weights model_final.pth --device cuda",
        "--weights output/gella_swin_t/model_final.pth --device cpu",
        "a GPU",
    ),
    Replacement("docs/APP.md", "sam:facebook/sam-vit-base", "sam:models/sam", HUB),
    Replacement(
        "docs/DEMO.md",
        "--min-area 100",
        "--min-area 1 --segmenter-option pred_iou_thresh=-100 "
        "--segmenter-option stability_score_thresh=0 --segmenter-option points_per_side=4",
        UNSURE,
    ),
    Replacement(
        "docs/ENTITY_MASKS.md",
        "setup=mask2former:add_maskformer2_config --option MODEL.MASK_FORMER.TEST.INSTANCE_ON=True",
        TOY_SETUP,
        "Mask2Former's repository: a Detectron2 model that finds red and blue",
    ),
    Replacement(
        "docs/ENTITY_MASKS.md",
        "--min-area 100",
        "--min-area 1 --option pred_iou_thresh=-100 --option stability_score_thresh=0 "
        "--option points_per_side=4",
        UNSURE,
    ),
    Replacement(
        "docs/ENTITY_MASKS.md",
        '--caption "A man leads two dogs."',
        '--caption "A man leads two dogs." --nouns "A man,two dogs"',
        "a trained model: the random one finds no nouns",
    ),
    Replacement("docs/ENTITY_MASKS.md", "CONFIG", "configs/gella_swin_t.yaml", OWN),
    Replacement("docs/ENTITY_MASKS.md", "PTH", "output/gella_swin_t/model_final.pth", OWN),
    Replacement("docs/ENTITY_MASKS.md", 'device="cuda"', 'device="cpu"', "a GPU"),
    Replacement("docs/EVALUATION.md", "CONFIG", "configs/gella_tiny_shapes.yaml", OWN),
    Replacement("docs/EVALUATION.md", "FILE", "output/gella_tiny_shapes/model_final.pth", OWN),
    Replacement("docs/EVALUATION.md", "OUTPUT_DIR", "output/gella_tiny_shapes", OWN),
    Replacement("docs/EVALUATION.md", "NAME", "gella_shapes_png_train", OWN),
    Replacement("docs/OPTIONS.md", "SOLVER.MAX_ITER 400", "SOLVER.MAX_ITER 2", SHORT),
    Replacement("docs/RESULTS.md", "--moved 7", "--moved 1 --iterations 2", SHORT),
    Replacement("docs/RESULTS.md", " MODEL.DEVICE cuda", " MODEL.DEVICE cpu", "a GPU"),
    Replacement(
        "docs/RESULTS.md",
        " SOLVER.ZERO.CONFIG configs/zero/stage2.json",
        "",
        "DeepSpeed compiles an op for a minute; tests/test_zero.py trains under it",
    ),
    Replacement("docs/RESULTS.md", "AMP.ENABLED True", "AMP.ENABLED False", "a GPU"),
    Replacement("docs/RESULTS.md", "SOLVER.MAX_ITER 200", "SOLVER.MAX_ITER 2", SHORT),
    Replacement("docs/RESULTS.md", "HIDDEN_SIZE 2048", "HIDDEN_SIZE 128", "a billion weights"),
    Replacement("docs/RESULTS.md", "INTERMEDIATE_SIZE 5504", "INTERMEDIATE_SIZE 160", "the same"),
    Replacement("docs/RESULTS.md", "NUM_LAYERS 20", "NUM_LAYERS 1", "the same"),
    Replacement("docs/TRAINING.md", " --num-machines 2 --machine-rank 0", "", GPUS),
    Replacement("docs/TRAINING.md", " --num-machines 2 --machine-rank 1", "", GPUS),
    Replacement("docs/TRAINING.md", "tcp://10.0.0.1:29500", "tcp://127.0.0.1:@PORT@", GPUS),
    Replacement("docs/TRAINING.md", "--nnodes 2 --nproc-per-node 8", "--nproc-per-node 2", GPUS),
    Replacement("docs/TRAINING.md", "10.0.0.1:29500", "127.0.0.1:@PORT@", GPUS),
    Replacement("docs/TRAINING.md", "TEST.EVAL_PERIOD 2000", "TEST.EVAL_PERIOD 1", SHORT),
    Replacement(
        "docs/WEIGHTS.md",
        "--mask2former model_final_9fd0ae.pkl",
        "--mask2former model_final_9fd0ae.pkl --colormap-encoder lcnet.pth",
        "the tiny model's colormap encoder is no Swin and has a file of its own",
    ),
    Replacement("docs/WEIGHTS.md", "iter_0008391", "iter_0000001", SHORT),
    Replacement("configs/README.md", "CONFIG.yaml", "models/toy/toy.yaml", OWN),
    Replacement("configs/README.md", "WEIGHTS.pth", "models/toy/toy.pth", OWN),
    Replacement("configs/README.md", "setup=PROJECT:ADD_CONFIG", TOY_SETUP, OWN),
    Replacement("configs/README.md", "INITIAL.pth", "output/gella_swin_t/model_final.pth", OWN),
    Replacement(
        "datasets/README.md",
        "datasets/prepare_shapes.py ",
        "datasets/prepare_shapes.py --train 4 --val 2 ",
        "minutes of drawing on a busy machine",
    ),
)


def replace(text: str, page: str) -> str:
    """The commands of a page, or the Makefile, after the changes of the table."""
    for entry in REPLACEMENTS:
        if entry.page == page or (entry.page == "*" and page != "Makefile"):
            text = text.replace(entry.old, entry.new)
    return text
