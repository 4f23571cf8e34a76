"""What the panels share: the way between Slicer's scene and the engine."""
