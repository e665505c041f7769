"""Prompts, answers, and where a caption names its nouns."""
