"""Use a model from Python: give it a picture and its entities once, then ask.

``scene.py`` reads the input, ``predictor.py`` asks the model, ``many.py`` batches requests.
"""

from gella.predictor.many import Request
from gella.predictor.predictor import DTYPES, TASKS, GellaPredictor, Grounding
from gella.predictor.scene import Scene, image_id_of

__all__ = ["DTYPES", "TASKS", "GellaPredictor", "Grounding", "Request", "Scene", "image_id_of"]
