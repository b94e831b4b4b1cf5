"""Every error Edgeward raises on purpose.

EdgewardError                 what, why, next step; exit code 1
├── UsageError                the caller's input is wrong; exit code 2
│   └── InvalidDocument       a file or message has a wrong field; names file and field
├── NotFound                  the named thing does not exist
├── Conflict                  a stale resourceVersion, or a thing that exists already
├── Forbidden                 the credential does not permit this
├── Unavailable               a peer cannot be reached, or answers that it cannot serve now
├── MissingDependency         an optional extra is not installed
├── TrustError                a signature, certificate, expiry or generation does not hold
│   └── DigestMismatch        bytes are not the ones that were signed for
├── PackageError              a model package is incomplete, inconsistent or of a refused format
└── RuntimeFault              an inference runtime refused or lost a model

The tree is what callers may catch; foreign exceptions are translated at the border of the module
that uses the foreign library and never travel further.
"""

from __future__ import annotations


class EdgewardError(Exception):
    """A failure with a cause and, where one is known, a next step for the person reading it."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(EdgewardError):
    exit_code = 2


class InvalidDocument(UsageError):
    """A document does not fit its schema.

    `source` names the file or message, `field` the path inside it (`spec.waves[0].count`).
    """

    def __init__(self, problem: str, *, source: str = "", field: str = "", hint: str = "") -> None:
        where = ": ".join(part for part in (source, field) if part)
        super().__init__(f"{where}: {problem}" if where else problem, hint=hint)
        self.problem = problem
        self.source = source
        self.field = field


class NotFound(EdgewardError):
    pass


class Conflict(EdgewardError):
    pass


class Forbidden(EdgewardError):
    pass


class Unavailable(EdgewardError):
    """`retry_after`: seconds to wait before the next try, where the peer said so."""

    def __init__(self, message: str, *, hint: str = "", retry_after: float | None = None) -> None:
        super().__init__(message, hint=hint)
        self.retry_after = retry_after


class MissingDependency(EdgewardError):
    pass


class TrustError(EdgewardError):
    pass


class DigestMismatch(TrustError):
    pass


class PackageError(EdgewardError):
    pass


class RuntimeFault(EdgewardError):
    pass
