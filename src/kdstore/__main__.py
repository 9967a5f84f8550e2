"""`python -m kdstore`: the command line without its script."""

from kdstore.cli import main

if __name__ == "__main__":
    main()
