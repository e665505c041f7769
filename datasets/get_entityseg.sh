#!/bin/sh
# EntitySeg: masks and images, 55 GB. For research only; accept the conditions of the images first, at
# huggingface.co/datasets/qqlu1992/Adobe_EntitySeg, and give a token: hf auth login.
# The names of the release's file and of the image archives are those of the project's own description
# (github.com/qqlu/Entity, Entityv2/DATA.md); that the pages have them under these names could not be
# verified when this was written. If one fails: github.com/adobe-research/EntitySeg-Dataset/releases
#
#   entityseg/annotations/entity_segmentation/entityv2_010203_entity_train.json
#   entityseg/images/entity_01_11580/  entity_02_11598/  entity_03_10049/
#   entityseg/annotations/captions_train.jsonl      made here, two captions an image
set -e
here=$(cd "$(dirname "$0")" && pwd)
cd "${DETECTRON2_DATASETS:-$here}"
masks=entityseg/annotations/entity_segmentation
wget -c -P $masks https://github.com/adobe-research/EntitySeg-Dataset/releases/download/v1.0/entityv2_010203_entity_train.json
hf download qqlu1992/Adobe_EntitySeg --repo-type dataset --include "entity_0*" --local-dir entityseg/archives
mkdir -p entityseg/images
for archive in $(find entityseg/archives -name "entity_0*.tar*"); do tar -xf "$archive" -C entityseg/images; done
for archive in $(find entityseg/archives -name "entity_0*.zip"); do unzip -q -o "$archive" -d entityseg/images; done
# A multimodal model writes the captions; GELLA_API_URL, _MODEL and _KEY say which (docs/CAPTIONS.md).
python "$here/../tools/describe_images.py" --images-json $masks/entityv2_010203_entity_train.json \
    --image-root entityseg/images --output entityseg/annotations/captions_train.jsonl
python "$here/check.py" gella_entityseg_captions_train
