"""The verbs, one file each: arguments and printing."""
