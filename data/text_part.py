"""What is read of a file at a time: all of it, or a part that does not depend on the others."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from nanotron_recipes.urls import is_url


class Part(BaseModel):
    """A stretch of a file: all of it, the lines that begin in a range of bytes, or a range of row groups."""

    model_config = ConfigDict(frozen=True)

    folder: str
    """A path or a URL."""
    file: str
    """Relative to the folder."""
    size: int
    """Bytes of the file that it stands for, to share work by."""
    first: int = 0
    """First byte, or first row group."""
    end: int | None = None
    """The byte or row group after the last one; null: to the end."""

    @property
    def where(self) -> str:
        """Name of the file as messages show it."""
        return f"{self.folder}/{self.file}" if is_url(self.folder) else str(Path(self.folder, self.file))
