"""Where the secret of a job with noise is kept, and how it is erased. It imports no torch, for those who only clean up."""

from pathlib import Path

SECRET_BYTES = 32
"""The length of a secret. A file of another one was torn."""


def secret_path(folder: Path) -> Path:
    """The file of the secret of the job whose commits are in ``folder``."""
    return folder / "privacy.key"


def erase_secret(folder: Path) -> None:
    """Delete the secret. Call this when no more noise is needed: whoever has the secret can subtract the noise."""
    secret_path(folder).unlink(missing_ok=True)
