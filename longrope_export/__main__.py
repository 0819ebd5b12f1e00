"""`python -m longrope_export`: the command line."""

from longrope_export.cli import main

if __name__ == "__main__":
    main()
