"""Evaluation loop, evaluator interface and checks of results."""

from .evaluator import DatasetEvaluator as DatasetEvaluator
from .evaluator import DatasetEvaluators as DatasetEvaluators
from .evaluator import inference_context as inference_context
from .evaluator import inference_on_dataset as inference_on_dataset
from .testing import print_csv_format as print_csv_format
from .testing import verify_results as verify_results
