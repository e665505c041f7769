#!/usr/bin/env python
"""`gella.commands.precompute_entities` as a script; --help says what it does."""

import sys

from gella.commands.precompute_entities import main

if __name__ == "__main__":
    sys.exit(main())
