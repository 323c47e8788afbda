"""The command line: arguments in, one call of a stage, words out."""
