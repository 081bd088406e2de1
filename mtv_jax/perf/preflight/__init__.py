"""What a config needs of a machine, found by compiling it."""
