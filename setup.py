"""Packaging of GELLA: the import package is `gella`, its code is `projects/gella/`.

Lower bounds of the requirements are the versions of `constraints-lowest.txt`. Its head says which
tests were run with them; `make test-lowest` runs all.
`constraints.txt` holds the exact versions of the continuous integration.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

REQUIREMENTS = [
    # -- the model
    "torch>=2.8",  # tensors, autograd, scaled_dot_product_attention
    "torchvision>=0.23",  # ops that timm and open_clip import
    "timm>=1.0.22",  # colormap encoder: pyramids of light backbones
    "open_clip_torch>=3.0",  # image encoder: CLIP's vision tower
    "transformers>=5.14",  # language decoder (LLaMA) and Mask2Former's modules
    "sentencepiece>=0.2",  # LLaVA's tokenizer is a SentencePiece model
    "protobuf>=4.25.3",  # with which transformers reads such models
    "tokenizers>=0.22.2",  # the small tokenizer of the synthetic shapes
    "safetensors>=0.8",  # weight files
    "huggingface_hub>=1.31",  # downloads of first weights, shards
    "scipy>=1.11.4",  # Hungarian matching of learned queries; filters of masks in pictures
    # -- data, metrics, pictures
    "numpy>=1.26.4",  # masks and metrics
    "pandas>=2.1.4",  # groups of the error analysis
    "pillow>=10.4",  # reading images, drawing scenes and results
    "pycocotools>=2.0.8",  # RLE masks and COCO average precision
    "matplotlib>=3.8.4",  # colours and fonts of the pictures, figures of the error analysis
    # -- Detectron2's conventions (what detectron2 itself asks for, see tools/setup_detectron2.py)
    "fvcore>=0.1.5.post20221221",  # configs, checkpoints, schedules
    "iopath>=0.1.9",  # file handlers below fvcore
    "yacs>=0.1.8",  # config nodes
    "tabulate>=0.9",  # result tables
    "termcolor>=2.4",  # coloured log
    "tensorboard>=2.16.2",  # training curves
    "tqdm>=4.66.1",  # progress bars
    # projects/detectron2_core is installed without isolation, by the setuptools of the environment
    "setuptools>=70.1",
]

EXTRAS = {
    "zero": ["deepspeed>=0.19.8"],  # ZeRO training of the 7B and 13B language decoder
    "lora": ["peft>=0.21"],  # MODEL.LANGUAGE.LORA: adapters instead of full fine-tuning
    "quantization": [  # MODEL.LANGUAGE.QUANTIZATION: 4- and 8-bit inference
        "bitsandbytes>=0.50",
        "accelerate>=1.15",
    ],
    "app": ["gradio>=6.31"],  # tools/app.py: the web page
    # Nouns of captions for configs/clip_zero_shot.yaml, where none are given; GELLA finds its own.
    "chunker": ["spacy>=3.8"],
    "captions": ["openai>=3.57"],  # tools/describe_images.py, --captioner URL: chat endpoints
    "dev": [
        "pytest>=9",  # make test
        "pytest-xdist>=3.8",  # two test processes
        "ruff>=0.17",  # make lint: style and format
        "mypy>=2.4",  # make lint: types
        # the optional parts under test: the web page, captions, ZeRO, adapters, quantisation
        "gradio>=6.31",
        "openai>=3.57",
        "playwright>=1.60",  # drives the page in Debian's Chromium; brings no browser of its own
        "deepspeed>=0.19.8",
        "peft>=0.21",
        "bitsandbytes>=0.50",
        "accelerate>=1.15",
        # what the original Detectron2 imports, for tests with its checkout on PYTHONPATH
        "cloudpickle>=3.1",
        "omegaconf>=2.4",
    ],
    "upstream": [
        # The originals; everything here runs without them.
        "detectron2 @ git+https://github.com/facebookresearch/detectron2.git",
        "panopticapi @ git+https://github.com/cocodataset/panopticapi.git",
    ],
}


def read_version() -> str:
    """`__version__` of the package, read without importing it."""
    text = (ROOT / "projects" / "gella" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    if found is None:
        raise RuntimeError('projects/gella/__init__.py has no line __version__ = "..."')
    return found.group(1)


def read_description() -> str:
    """README.md, or one line while there is none."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else "Entity grounding"


setup(
    name="gella",
    version=read_version(),
    description="GELLA: grounding every entity that a long caption names, for Detectron2",
    long_description=read_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    package_dir={"": "projects"},
    packages=find_packages("projects", include=["gella", "gella.*"]),
    package_data={
        "gella.pictures": ["page.css", "page.js"],
        "gella.commands": ["analyze.css"],
    },
    entry_points={
        "console_scripts": [
            "gella-train = gella.commands.train:main",
            "gella-eval = gella.commands.train:evaluate_only",
            "gella-demo = gella.commands.demo:main",
            "gella-app = gella.commands.app:main",
        ]
    },
    python_requires=">=3.10,<3.13",
    install_requires=REQUIREMENTS,
    extras_require=EXTRAS,
)
