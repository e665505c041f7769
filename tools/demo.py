#!/usr/bin/env python
"""`gella.commands.demo` as a script; --help says what it does."""

import sys

from gella.commands.demo import main

if __name__ == "__main__":
    sys.exit(main())
