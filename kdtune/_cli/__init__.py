"""The `kdtune` command: argparse in, library call out. Importing it never imports torch."""
