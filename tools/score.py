#!/usr/bin/env python
"""`gella.commands.score` as a script; --help says what it does."""

import sys

from gella.commands.score import main

if __name__ == "__main__":
    sys.exit(main())
