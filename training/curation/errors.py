"""What the person who curates can mend; every message names the remedy."""

from __future__ import annotations

from LCTfoundLib.errors import LCTfoundError

__all__ = ["LeaseLost", "LedgerError", "MissingPackage", "NoCluster", "UnreadableReport", "UnsuitableAnnotation"]


class LedgerError(LCTfoundError):
    """The ledger is missing, damaged, of another version, or asked for a study that it does not hold."""


class LeaseLost(LCTfoundError):
    """Another worker took the studies over, because this one gave no sign of life for too long."""


class UnreadableReport(LCTfoundError):
    """A file of reports is in an unknown encoding, format or layout."""


class UnsuitableAnnotation(LCTfoundError):
    """Annotated reports that a classifier cannot learn from."""


class NoCluster(LCTfoundError):
    """The cluster's scheduler does not answer."""


class MissingPackage(LCTfoundError):
    """An optional package is not installed."""
