"""The entry point of the `kdstore` script and of `python -m kdstore`; it imports the command line where Ctrl-C is one line already."""

import sys


def main() -> None:
    """Run the command line."""
    try:
        from kdstore.cli import main as run

        run()
    except KeyboardInterrupt:  # before the command began, or while it was ending
        print("interrupted: Stopped.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
