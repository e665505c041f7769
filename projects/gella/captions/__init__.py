"""Captions and their nouns from multimodal models: endpoints, local models, the file, the run."""
