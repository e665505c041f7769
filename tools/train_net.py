#!/usr/bin/env python
"""Train or evaluate GELLA with Detectron2's command line; --help says how."""

from gella.commands.train import main

if __name__ == "__main__":
    main()
