"""`python -m hdscale VERB`: the same as the `hdscale` command."""

import sys

from hdscale.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
