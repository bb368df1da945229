"""`python -m kdtune` is the `kdtune` command."""

from kdtune._cli.main import main

if __name__ == "__main__":
    main()
