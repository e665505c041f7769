"""Still pictures of results; ``visualizer.py`` composes the other files of this room."""
