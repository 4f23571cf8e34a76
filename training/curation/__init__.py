"""From a hospital's archive of DICOM studies and reports to shards of anonymous slices to train on.

    python -m training.curation run ARCHIVE OUT [--reports FILE] [--workers N]
    python -m training.curation status | counts | review OUT

``OUT/shards`` may leave the hospital; ``OUT/private`` (ledger, site key) must not. The stages are plain functions
(:mod:`archive`, :mod:`quality`, :mod:`deidentify`, :mod:`shards`, :mod:`stages`); processes of one machine
(:mod:`local`) and a Dask cluster (:mod:`cluster`) run the same ones.
"""
