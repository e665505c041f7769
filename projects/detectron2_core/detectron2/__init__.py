"""A small, pure-Python stand-in for Detectron2: same import names, same observable behaviour.

It covers only the documented API that the GELLA project calls; README.md lists the limits. The
version ends in ``+core`` so that logs always tell which of the two distributions was in use.
"""

__version__ = "0.6+core"
