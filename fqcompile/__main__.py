"""`python -m fqcompile` is the command `fqcompile`."""

from fqcompile.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
