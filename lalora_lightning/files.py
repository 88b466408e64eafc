"""Reading and writing files: checksums, damaged files, atomic replacement."""

import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["first_line", "load_file", "replaced_when_complete", "require_intact_file"]


def require_intact_file(path: str | os.PathLike[str]) -> None:
    """Check a file against the checksums stored in it, which ``torch.load`` does not do.

    Files that are not zip archives have no checksums and are not checked.

    Raises:
        ValueError: The file is damaged.
    """
    if not Path(path).is_file():
        return
    try:
        # Raises an error, too, if the end of the archive is damaged.
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            # torch reads nothing of an entry that is marked as a directory, and leaves its tensor uninitialized.
            directories = (entry.filename for entry in archive.infolist() if entry.external_attr & 0x10)
            damaged = archive.testzip() or next(directories, None)
    except Exception as error:
        # Damage leads to BadZipFile and many other errors.
        damaged = str(error)
    if damaged is not None:
        raise ValueError(
            f"Expected {path} to be as it was written but it is damaged: {damaged}. Use another copy of it."
        )


def load_file(path: str | os.PathLike[str], kind: str) -> Any:
    """Load plain types and tensors with ``torch.load``, after checking the file's checksums.

    Args:
        path: The file.
        kind: Description of the expected contents, for the error message.

    Raises:
        ValueError: The file is damaged or of another kind.
    """
    import torch

    require_intact_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception as error:
        # torch raises errors of many types, depending on the contents of the file.
        raise ValueError(
            f"Expected {path} to be {kind} but it cannot be read ({type(error).__name__}: {first_line(error)})."
        ) from error


@contextmanager
def replaced_when_complete(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path``, and rename it to ``path`` if the block ends without an error.

    If there is an error, or if the process is killed, an existing file at ``path`` is not changed.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def first_line(error: BaseException) -> str:
    r"""Return the first line of an error's message, or its type if it has no message.

    >>> first_line(ValueError("no such file\nhint: look elsewhere")), first_line(KeyboardInterrupt())
    ('no such file', 'KeyboardInterrupt')
    """
    return (str(error).strip() or type(error).__name__).splitlines()[0]
