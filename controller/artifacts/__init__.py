"""Where artifacts are kept, each under its SHA-256: a port, and an adapter for a folder and one for S3."""

from controller.artifacts.folder import FolderArtifacts
from controller.artifacts.store import Artifacts, Remote, Upload, need, read

__all__ = ["Artifacts", "FolderArtifacts", "Remote", "Upload", "need", "read"]
