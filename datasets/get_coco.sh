#!/bin/sh
# COCO 2017: images and panoptic annotations, from the addresses of cocodataset.org. 20 GB of archives.
# Run again after an interruption: downloads go on. Archives may be deleted once the check passed.
#
#   coco/train2017/*.jpg  coco/val2017/*.jpg
#   coco/annotations/panoptic_{train,val}2017.json  coco/annotations/panoptic_{train,val}2017/*.png
set -e
here=$(cd "$(dirname "$0")" && pwd)
cd "${DETECTRON2_DATASETS:-$here}"
mkdir -p coco/archives
wget -c -P coco/archives http://images.cocodataset.org/zips/val2017.zip
wget -c -P coco/archives http://images.cocodataset.org/zips/train2017.zip
wget -c -P coco/archives http://images.cocodataset.org/annotations/panoptic_annotations_trainval2017.zip
unzip -q -o coco/archives/val2017.zip -d coco
unzip -q -o coco/archives/train2017.zip -d coco
unzip -q -o coco/archives/panoptic_annotations_trainval2017.zip -d coco
unzip -q -o coco/annotations/panoptic_val2017.zip -d coco/annotations
unzip -q -o coco/annotations/panoptic_train2017.zip -d coco/annotations
python "$here/check.py" gella_coco_panoptic_val2017
python "$here/check.py" gella_coco_panoptic_train2017
