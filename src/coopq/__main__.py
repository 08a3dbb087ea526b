"""`python -m coopq` is the command line."""

from coopq.cli.main import main

if __name__ == "__main__":
    main()
