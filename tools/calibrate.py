#!/usr/bin/env python
"""`gella.commands.calibrate` as a script; --help says what it does."""

import sys

from gella.commands.calibrate import main

if __name__ == "__main__":
    sys.exit(main())
