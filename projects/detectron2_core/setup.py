"""Install script of the small ``detectron2`` core (see README.md for what it leaves out)."""

from __future__ import annotations

from setuptools import find_packages, setup

needs = "fvcore iopath numpy tabulate tensorboard termcolor torch yacs"
setup(
    name="detectron2",
    version="0.6+core",
    description="The part of Detectron2's documented API that GELLA uses, in plain Python",
    packages=find_packages(),
    python_requires=">=3.10",
    install_requires=needs.split(),
)
