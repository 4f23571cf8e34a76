"""Runtime: device and precision, tiling, memory fallback, progress, cancel."""
