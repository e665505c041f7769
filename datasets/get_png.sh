#!/bin/sh
# Panoptic Narrative Grounding over COCO 2017 (get_coco.sh first).
# The project's page links its files by scripts that could not be read when this was written. The server
# is the one that its README (github.com/BCV-Uniandes/PNG) names, and other projects fetch the val file
# from there; the address of the train file follows from it. If one fails:
# https://bcv-uniandes.github.io/panoptic-narrative-grounding/#downloads
#
#   coco/annotations/png_coco_{train,val}2017.json
set -e
here=$(cd "$(dirname "$0")" && pwd)
cd "${DETECTRON2_DATASETS:-$here}"
server=https://lambda004.uniandes.edu.co/panoptic-narrative-grounding/annotations
wget -c -P coco/annotations $server/png_coco_val2017.json
wget -c -P coco/annotations $server/png_coco_train2017.json
python "$here/check.py" gella_coco_png_val2017
python "$here/check.py" gella_coco_png_train2017
