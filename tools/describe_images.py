#!/usr/bin/env python
"""`gella.commands.describe_images` as a script; --help says what it does."""

import sys

from gella.commands.describe_images import main

if __name__ == "__main__":
    sys.exit(main())
