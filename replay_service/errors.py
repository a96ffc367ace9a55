"""Everything that can go wrong at the boundary of the replay service.

::

    ReplayError
    ├── ReplayConfigError    a configuration that cannot work, with the arithmetic
    │   └── ReplayOwned      a server that holds the replay of another run
    ├── ReplayUnavailable    no server, or one that is loading
    │   ├── ReplayTimeout    the server did not answer within the deadline
    │   └── ReplayMissing    a server on which no replay has been created, or that has lost it
    ├── ReplayAuthError      the server refuses these credentials
    ├── ReplaySchemaError    columns differ from what the replay holds
    ├── ReplayFull           the server has no memory left
    ├── ReplayEmpty          nothing to sample yet
    ├── ReplayFenced         a newer learner has taken over
    ├── ReplayClosed         the writer was closed or interrupted while waiting
    └── ChunkError           bytes that are not a valid chunk
"""

from __future__ import annotations


class ReplayError(Exception):
    """Base of every error that the replay service raises on purpose."""


class ReplayConfigError(ReplayError, ValueError):
    """A configuration that cannot work; the message shows the arithmetic and the remedy."""


class ReplayOwned(ReplayConfigError):
    """The server holds the replay of another run; the message names it."""


class ReplayUnavailable(ReplayError):
    """The server cannot be used now; trying again later may help."""


class ReplayTimeout(ReplayUnavailable):
    """The server, or the delivery of chunks, missed its deadline."""


class ReplayMissing(ReplayUnavailable):
    """The server answers and holds no replay: none has been created yet, or its data is gone."""


class ReplayAuthError(ReplayError):
    """The server refuses the credentials; trying again does not help."""


class ReplaySchemaError(ReplayError):
    """Records or chunks whose columns differ from the schema of the replay."""


class ReplayFull(ReplayError):
    """The server has reached its memory limit."""


class ReplayEmpty(ReplayError):
    """There is no complete window to sample yet."""


class ReplayFenced(ReplayError):
    """A learner with a newer fence has taken over; this one must stop."""


class ReplayClosed(ReplayError):
    """The uploader was closed or interrupted while a writer waited."""


class ChunkError(ReplayError):
    """Bytes that are not a valid chunk of this schema."""
