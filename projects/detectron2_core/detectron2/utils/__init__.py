"""Process groups, metrics, logging, files, seeds."""
