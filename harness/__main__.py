"""`python -m harness` is the same as `harness`."""

import sys

from harness.cli import main

if __name__ == "__main__":
    code = main()
    # Under -m, Python ends by SIGINT whatever the exit code if Ctrl-C has ever struck while it ran generated
    # source, such as a namedtuple of psutil's. Running some more makes it forget.
    exec("")
    sys.exit(code)
