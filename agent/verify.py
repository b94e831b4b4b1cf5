"""From a wish to verified bytes: TUF metadata, manifest, blobs. Only here is a VerifiedPackage made."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from tuf.api.exceptions import DownloadError, DownloadHTTPError
from tuf.ngclient.fetcher import FetcherInterface

from agent import delta
from agent.fetch import BlobStore
from agent.imports import Imports
from agent.peers.obtain import Peers
from agent.release_metadata import MetadataRefused, refresh
from agent.trusted_clock import TrustedClock
from edgeward.client.transport import Transport
from edgeward.errors import EdgewardError, NotFound, PackageError, TrustError, Unavailable
from edgeward.formats import SNIFF_BYTES, check_model_head
from edgeward.storage import make_folder
from edgeward.wire.desired import ModelRef
from edgeward.wire.package import Blob, GoldenVectors, Manifest, Variant, decode_manifest, target_path

log = logging.getLogger(__name__)

_KEY = object()


class VerifiedPackage:
    """A released model version whose every byte was checked; nothing else may enter a slot.

    Holds the manifest, the chosen variant and its bytes, and the golden vectors. Made by Verifier only.
    """

    def __init__(
        self,
        key: object,
        ref: ModelRef,
        manifest: Manifest,
        variant: Variant,
        content: bytes,
        golden: GoldenVectors,
    ) -> None:
        if key is not _KEY:
            raise TypeError("a VerifiedPackage is made by Verifier only")
        self.ref = ref
        self.manifest = manifest
        self.variant = variant
        self.content = content
        self.golden = golden


class _Fetcher(FetcherInterface):
    """TUF metadata over our own transport, with its time-outs."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    def _fetch(self, url: str) -> Any:
        path = url.removeprefix(self._transport.base_url)
        try:
            yield self._transport.request("GET", path).content
        except NotFound as error:
            raise DownloadHTTPError(str(error), 404) from None
        except EdgewardError as error:
            raise DownloadError(str(error)) from None


class _FileFetcher(FetcherInterface):
    """TUF metadata that somebody brought: `read` gives a file of it by its name, None when it is not there."""

    def __init__(self, read: Callable[[str], bytes | None]) -> None:
        self._read = read

    def _fetch(self, url: str) -> Any:
        try:
            data = self._read(url.rpartition("/")[2])
        except OSError as error:
            raise DownloadError(str(error)) from None
        if data is None:
            raise DownloadHTTPError(f"there is no {url.rpartition('/')[2]}", 404)
        yield data


def signed_length(
    folder: Path, root: bytes, read: Callable[[str], bytes | None], ref: ModelRef, clock: TrustedClock
) -> int:
    """Like Verifier.target_length, by metadata that `read` gives instead of the controller.

    `folder` holds the metadata trusted so far and keeps what is trusted from now on.
    """
    return _signed_length(folder, root, "file:///tuf/", _FileFetcher(read), ref, clock)


def _signed_length(
    folder: Path, root: bytes, base: str, fetcher: FetcherInterface, ref: ModelRef, clock: TrustedClock
) -> int:
    # Without delegations (the controller refuses them) looking a target up loads nothing more.
    info = refresh(folder, base, fetcher, root, clock).get_targetinfo(target_path(ref.model, ref.version))
    if info is None:
        # Somebody on the link may hold newer metadata back for as long as the old has not expired.
        raise MetadataRefused(
            f"{ref.model} version {ref.version} is not released: not in the release metadata at hand"
        )
    if info.hashes.get("sha256") != ref.digest:
        raise TrustError(f"{ref.model} version {ref.version} was released with another digest")
    return int(info.length)


class Verifier:
    """Asks the release metadata for a version, and fetches what it signs.

    Where the controller does not answer, `imports` may hold metadata and blobs that were brought by hand;
    they are verified in the same way. `peers` may have blobs, and are believed nothing.
    """

    def __init__(
        self,
        folder: Path,
        root: bytes,
        blobs: BlobStore,
        transport: Transport,
        clock: TrustedClock,
        imports: Imports | None = None,
        peers: Peers | None = None,
    ) -> None:
        self._metadata = folder
        self._root = root
        self._blobs = blobs
        self._transport = transport
        self._clock = clock
        self._imports = imports
        self._peers = peers
        make_folder(folder)

    def target_length(self, ref: ModelRef) -> int:
        """The manifest's size as signed by the releaser, when the signed digest is the one wished for.

        Raises TrustError when it was released with another digest; Unavailable when the metadata cannot be
        had, does not hold, or does not name it (yet).
        """
        base = f"{self._transport.base_url}/tuf/"
        try:
            return _signed_length(
                self._metadata, self._root, base, _Fetcher(self._transport), ref, self._clock
            )
        except Unavailable as error:
            found = self._imports.newest() if self._imports is not None else None
            if found is None:
                raise
            try:
                return signed_length(self._metadata, self._root, found.metadata, ref, self._clock)
            except (TrustError, Unavailable) as imported:
                # Not a refusal for good: the controller may know better once it answers.
                both = Unavailable(f"{error.message}; what was imported: {imported}")
                both.retry_after = error.retry_after
                raise both from None

    def fetch_manifest(self, ref: ModelRef) -> Manifest:
        """The signed manifest, downloaded if it is not here yet."""
        length = self.target_length(ref)
        self._take(ref.digest, length)
        self._obtain(Blob(ref.digest, length))
        return read_manifest(ref, self._blobs.read(ref.digest, length))

    def fetch_blobs(self, manifest: Manifest, variant: Variant, earlier: Iterable[ModelRef] = ()) -> None:
        """Download what is not here yet; the variant's blob as a delta from an `earlier` model if possible."""
        for blob in (variant.blob, manifest.golden.blob):
            self._take(blob.digest, blob.size)
        bases = delta.bases(variant, self._held(earlier))
        self._obtain(variant.blob, bases)
        self._obtain(manifest.golden.blob)

    def _obtain(self, blob: Blob, bases: Sequence[Blob] = ()) -> None:
        """From a peer that has it or fetches it already, else from the controller, as a delta if possible."""

        def download() -> None:
            delta.fetch(self._blobs, self._transport, blob, bases, self._clock)
            self._blobs.fetch(self._transport, blob.digest, blob.size, self._clock)

        if self._peers is None:
            download()
        else:
            self._peers.obtain(blob.digest, blob.size, download)

    def collect(self, kept: Mapping[ModelRef, Collection[str] | None]) -> int:
        """Remove every blob but these models' manifests, golden vectors and those variants' blobs that are
        named (None: all of them); bytes that are free again.

        Raises EdgewardError, and removes nothing, when what one of them consists of cannot be read.
        """
        keep: set[str] = set()
        for ref, blobs in kept.items():
            keep.add(ref.digest)
            if self._blobs.path(ref.digest).exists():  # else it is still to come
                manifest = self.reopen_manifest(ref)
                everything = {blob.digest for blob in manifest.blobs()}
                keep |= everything if blobs is None else {manifest.golden.blob.digest, *blobs}
        return self._blobs.collect(keep)

    def _take(self, digest: str, size: int) -> None:
        found = self._imports.newest() if self._imports is not None else None
        if found is not None:
            found.take(digest, size, self._blobs)

    def open(self, ref: ModelRef, manifest: Manifest, variant: Variant) -> VerifiedPackage:
        """Read the fetched bytes, hashing them again. Raises PackageError, DigestMismatch."""
        content = self._blobs.read(variant.blob.digest, variant.blob.size)
        check_model_head(content[:SNIFF_BYTES], variant.runtime, f"{ref.model}:{ref.version} {variant.name}")
        golden = self._blobs.read(manifest.golden.blob.digest, manifest.golden.blob.size)
        try:
            vectors = msgspec.msgpack.decode(golden, type=GoldenVectors)
        except msgspec.DecodeError as error:
            raise PackageError(f"{ref.model}:{ref.version}: golden vectors: {error}") from None
        return VerifiedPackage(_KEY, ref, manifest, variant, content, vectors)

    def reopen_manifest(self, ref: ModelRef) -> Manifest:
        """The manifest of a model that was verified and activated before, for a start without network.

        Its digest is the one that the durable state vouches for.
        """
        path = self._blobs.path(ref.digest)
        size = path.stat().st_size if path.exists() else 0
        return read_manifest(ref, self._blobs.read(ref.digest, size))

    def _held(self, refs: Iterable[ModelRef]) -> Iterator[Manifest]:
        for ref in refs:
            try:
                yield self.reopen_manifest(ref)
            except (EdgewardError, OSError) as error:
                log.info("%s:%s is no base for a delta: %s", ref.model, ref.version, error)


def read_manifest(ref: ModelRef, content: bytes) -> Manifest:
    """The manifest in bytes of the signed digest. Raises InvalidDocument, TrustError for another version's."""
    manifest = decode_manifest(content, source=f"manifest of {ref.model}:{ref.version}")
    if (manifest.model, manifest.version) != (ref.model, ref.version):
        raise TrustError(
            f"the manifest is of {manifest.model}:{manifest.version}, expected {ref.model}:{ref.version}"
        )
    return manifest
