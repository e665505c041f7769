"""The command lines. `tools/` holds scripts of a few lines that call them."""
