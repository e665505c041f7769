"""Configuration: the node type, the default values and the ``configurable`` decorator."""

from .config import CfgNode, configurable, get_cfg

__all__ = ["CfgNode", "configurable", "get_cfg"]
