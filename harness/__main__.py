"""`python -m harness` and the `harness` command."""

import sys


def main() -> None:
    """Run the command line; the exit code is 0, 1 (a case failed), 2 (a mistake in what was asked) or 130."""
    from harness import cli

    sys.exit(cli.main())


if __name__ == "__main__":
    main()
