#!/usr/bin/env python
"""`gella.commands.calibrate` as a script; --help says what it does."""

from gella.commands.calibrate import main

if __name__ == "__main__":
    main()
