"""`python -m packtrain`: the command, where its console script is not on the path."""

import sys

from packtrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
