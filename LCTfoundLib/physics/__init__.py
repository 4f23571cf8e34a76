"""Physics of the scanner: rays and their projector, noise, Hounsfield units, and the classic solvers."""
