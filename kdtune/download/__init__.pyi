from .hub import DUPLICATE_WEIGHTS, download_repository
from .package import download_package
from .record import Download, default_output_dir, downloaded_from

__all__ = [
    "DUPLICATE_WEIGHTS",
    "Download",
    "default_output_dir",
    "download_package",
    "download_repository",
    "downloaded_from",
]
