"""Pictures of results: ``grounding.py`` has the results and draws them, ``html.py`` makes pages."""
