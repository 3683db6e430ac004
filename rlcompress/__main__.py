"""`python -m rlcompress`: the command line, and the entry point of a submitted Ray job."""

from rlcompress.cli import main

if __name__ == "__main__":
    main()
