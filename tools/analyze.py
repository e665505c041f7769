#!/usr/bin/env python
"""`gella.commands.analyze` as a script; --help says what it does."""

import sys

from gella.commands.analyze import main

if __name__ == "__main__":
    sys.exit(main())
