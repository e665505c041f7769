#!/bin/sh
# RefCOCO, RefCOCO+ and RefCOCOg over COCO train2017 (get_coco.sh first). 200 MB.
# The server of github.com/lichengunc/refer is dead; these are the web archive's copies of its files,
# which several projects link.
#
#   refcoco/   instances.json  refs(unc).p  refs(google).p
#   refcoco+/  instances.json  refs(unc).p
#   refcocog/  instances.json  refs(umd).p  refs(google).p
set -e
here=$(cd "$(dirname "$0")" && pwd)
cd "${DETECTRON2_DATASETS:-$here}"
mkdir -p coco/archives
server=https://bvisionweb1.cs.unc.edu/licheng/referit/data
wget -c -P coco/archives https://web.archive.org/web/20220413011718/$server/refcoco.zip
wget -c -P coco/archives https://web.archive.org/web/20220413011656/$server/refcoco+.zip
wget -c -P coco/archives https://web.archive.org/web/20220413012904/$server/refcocog.zip
unzip -q -o coco/archives/refcoco.zip
unzip -q -o coco/archives/refcoco+.zip
unzip -q -o coco/archives/refcocog.zip
python "$here/check.py" gella_refcoco_unc_val
python "$here/check.py" gella_refcocoplus_unc_val
python "$here/check.py" gella_refcocog_umd_val
