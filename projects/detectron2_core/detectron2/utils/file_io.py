"""The path manager through which configs, logs and checkpoints are opened."""

from iopath.common.file_io import HTTPURLHandler
from iopath.common.file_io import PathManager as _IopathManager

__all__ = ["PathManager"]

# An own instance: handlers registered here do not leak into other libraries.
PathManager = _IopathManager()
PathManager.register_handler(HTTPURLHandler())
