"""Registry of named classes and functions (fvcore's)."""

from fvcore.common.registry import Registry

__all__ = ["Registry"]
