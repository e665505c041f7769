"""An evaluator of one's own: how many words a generated answer has, on the scenes' narratives."""

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from gella.evaluation import register_evaluator


class AnswerLength(DatasetEvaluator):
    """Words per answer (task "length"); every process has a share of the samples."""

    def reset(self):
        self.lengths = []

    def process(self, inputs, outputs):
        self.lengths += [len(output["text"].split()) for output in outputs]

    def evaluate(self):
        lengths = [n for part in comm.gather(self.lengths) for n in part]
        if not comm.is_main_process():
            return {}
        return {"length": {"words": sum(lengths) / len(lengths), "n": float(len(lengths))}}


# The model is asked to extract the nouns of each caption; `cfg` and `folder` could say more.
register_evaluator("answer_length", lambda cfg, name, folder: AnswerLength(), task="extract")

# The same records under another name, because a dataset has one evaluator_type.
DatasetCatalog.register("answers_val", lambda: DatasetCatalog.get("gella_shapes_nouns_val"))
MetadataCatalog.get("answers_val").set(evaluator_type="answer_length")
