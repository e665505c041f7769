"""Use a model from Python: give it a picture and its entities once, then ask.

``scene.py`` reads the input, ``questions.py`` says what is asked, ``engine.py`` runs the model and
``many.py`` batches, ``answers.py`` makes results; ``predictor.py`` composes them.
"""

from gella.predictor.predictor import DTYPES, GellaPredictor, Grounding, Request, Scene, image_id_of

__all__ = ["DTYPES", "GellaPredictor", "Grounding", "Request", "Scene", "image_id_of"]
