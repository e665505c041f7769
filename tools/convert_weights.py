#!/usr/bin/env python
"""`gella.commands.convert_weights` as a script; --help says what it does."""

import sys

from gella.commands.convert_weights import main

if __name__ == "__main__":
    sys.exit(main())
