#!/usr/bin/env python
"""`gella.commands.app` as a script; --help says what it does."""

import sys

from gella.commands.app import main

if __name__ == "__main__":
    sys.exit(main())
