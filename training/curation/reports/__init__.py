"""The report classifier in the paper's three modules: entities, relations between them, class heads.

:mod:`entities` finds findings, positions and statuses by rules (English and Chinese); :mod:`relations` tells which
status and position belong to which finding; :mod:`heads` turns that into calibrated probabilities; :mod:`learning`
asks for the annotations that help most.
"""
