"""Default values, equal to Detectron2's for every key that is present here."""

from .config import CfgNode as CN

_C = CN({"VERSION": 2, "OUTPUT_DIR": "./output", "CUDNN_BENCHMARK": False, "VIS_PERIOD": 0})
_C.SEED = -1  # negative: a random seed
_C.FLOAT32_PRECISION = ""  # "", highest, high or medium (torch.set_float32_matmul_precision)
_C.GLOBAL = CN({"HACK": 1.0})

_C.MODEL = CN({"DEVICE": "cuda", "META_ARCHITECTURE": "GeneralizedRCNN", "MASK_ON": False})
_C.MODEL.WEIGHTS = ""  # checkpoint loaded at the start; "" for none
_C.MODEL.PIXEL_MEAN = [103.530, 116.280, 123.675]  # in INPUT.FORMAT order, 0..255
_C.MODEL.PIXEL_STD = [1.0, 1.0, 1.0]
_C.MODEL.BACKBONE = CN({"NAME": "build_resnet_backbone", "FREEZE_AT": 2})
_C.MODEL.SEM_SEG_HEAD = CN({"NAME": "SemSegFPNHead", "IN_FEATURES": ["p2", "p3", "p4", "p5"]})
_C.MODEL.SEM_SEG_HEAD.IGNORE_VALUE = 255
_C.MODEL.SEM_SEG_HEAD.NUM_CLASSES = 54
_C.MODEL.SEM_SEG_HEAD.CONVS_DIM = 128
_C.MODEL.SEM_SEG_HEAD.COMMON_STRIDE = 4
_C.MODEL.SEM_SEG_HEAD.NORM = "GN"
_C.MODEL.SEM_SEG_HEAD.LOSS_WEIGHT = 1.0

_C.INPUT = CN({"FORMAT": "BGR", "MASK_FORMAT": "polygon", "RANDOM_FLIP": "horizontal"})
_C.INPUT.MIN_SIZE_TRAIN = (800,)  # pixels, shorter side
_C.INPUT.MAX_SIZE_TRAIN = 1333
_C.INPUT.MIN_SIZE_TEST = 800  # 0 turns the resize off
_C.INPUT.MAX_SIZE_TEST = 1333
_C.INPUT.CROP = CN({"ENABLED": False, "TYPE": "relative_range", "SIZE": [0.9, 0.9]})

_C.DATASETS = CN({"TRAIN": (), "TEST": ()})  # names in DatasetCatalog
_C.DATALOADER = CN({"NUM_WORKERS": 4, "ASPECT_RATIO_GROUPING": True})  # processes per rank
_C.DATALOADER.SAMPLER_TRAIN = "TrainingSampler"
_C.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True

_C.SOLVER = CN({"LR_SCHEDULER_NAME": "WarmupMultiStepLR", "MAX_ITER": 40000})
_C.SOLVER.BASE_LR = 0.001
_C.SOLVER.BASE_LR_END = 0.0  # of WarmupCosineLR
_C.SOLVER.MOMENTUM = 0.9
_C.SOLVER.NESTEROV = False
_C.SOLVER.WEIGHT_DECAY = 0.0001
_C.SOLVER.WEIGHT_DECAY_NORM = 0.0
_C.SOLVER.WEIGHT_DECAY_BIAS = None  # None: same as WEIGHT_DECAY
_C.SOLVER.BIAS_LR_FACTOR = 1.0
_C.SOLVER.GAMMA = 0.1
_C.SOLVER.STEPS = (30000,)  # iterations; those after MAX_ITER are dropped
_C.SOLVER.NUM_DECAYS = 3
_C.SOLVER.WARMUP_FACTOR = 1.0 / 1000
_C.SOLVER.WARMUP_ITERS = 1000
_C.SOLVER.WARMUP_METHOD = "linear"
_C.SOLVER.RESCALE_INTERVAL = False
_C.SOLVER.CHECKPOINT_PERIOD = 5000  # iterations
_C.SOLVER.IMS_PER_BATCH = 16  # over all ranks
_C.SOLVER.REFERENCE_WORLD_SIZE = 0  # 0: no automatic scaling
_C.SOLVER.CLIP_GRADIENTS = CN({"ENABLED": False, "CLIP_TYPE": "value"})
_C.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = 1.0
_C.SOLVER.CLIP_GRADIENTS.NORM_TYPE = 2.0
_C.SOLVER.AMP = CN({"ENABLED": False})

_C.TEST = CN({"AUG": {"ENABLED": False}, "PRECISE_BN": {"ENABLED": False}})
_C.TEST.EXPECTED_RESULTS = []  # [[task, metric, value, tolerance], ...]
_C.TEST.EVAL_PERIOD = 0  # iterations; 0: only after training
_C.TEST.DETECTIONS_PER_IMAGE = 100
