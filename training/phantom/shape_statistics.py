"""Measured proportions of real lungs: the constants the phantom draws its shapes from.

Source: 13 of the 26 human-corrected lobe maps of LUNA16 scans (the first 13 by file name); the other 13 are kept for
testing. Only means, standard deviations and correlations of a parametrization stand here, no outline of a patient.
One of the 13, a crop of a small chest, is left out: the numbers are those of 12 maps, rounded.

Coordinates of the profiles: X = distance from the midline / half the width of both lungs, Y = (y - front) / depth,
Z = (z - base) / height of both lungs together.
"""

from __future__ import annotations

import numpy as np

__all__ = [
    "BOX_CORRELATION",
    "BOX_MEAN",
    "BOX_SD",
    "LOBE_SHARE_MEAN",
    "LOBE_SHARE_SD",
    "PROFILE_COLUMNS",
    "PROFILE_MEAN",
    "PROFILE_SD",
    "PROFILE_Z",
]

#: Width, depth and height in mm of the box around both lungs.
BOX_MEAN = np.array([296.0, 202.0, 274.0])
BOX_SD = np.array([16.0, 15.0, 24.0])
#: Of the logarithms, from 12 maps only: -0.12 between width and height was set to 0.1, larger people being larger in
#: every direction.
BOX_CORRELATION = np.array([[1.0, 0.25, 0.1], [0.25, 1.0, 0.16], [0.1, 0.16, 1.0]])

#: Volume shares of the five lobes (codes 1-5) in both lungs.
LOBE_SHARE_MEAN = np.array([0.205, 0.090, 0.243, 0.242, 0.220])
LOBE_SHARE_SD = np.array([0.040, 0.025, 0.036, 0.029, 0.035])

#: Heights at which the cross-sections of a lung were measured.
PROFILE_Z = np.array([0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.78, 0.85, 0.9, 0.94, 0.97, 0.985])
#: Lateral and medial extreme (X), anterior and posterior extreme (Y), Y of the lateral extreme, X of the anterior
#: and of the posterior extreme.
PROFILE_COLUMNS = ("lateral", "medial", "anterior", "posterior", "lateral_y", "anterior_x", "posterior_x")
PROFILE_MEAN = np.array(
    [
        # right
        [
            [0.973, 0.003, 0.050, 0.952, 0.516, 0.473, 0.493],
            [0.943, -0.001, 0.031, 0.967, 0.512, 0.428, 0.478],
            [0.908, -0.013, 0.036, 0.970, 0.497, 0.351, 0.470],
            [0.879, -0.040, 0.055, 0.968, 0.515, 0.292, 0.448],
            [0.850, -0.026, 0.087, 0.951, 0.518, 0.264, 0.426],
            [0.806, 0.012, 0.138, 0.919, 0.540, 0.269, 0.402],
            [0.756, 0.017, 0.201, 0.883, 0.557, 0.304, 0.388],
            [0.694, 0.013, 0.297, 0.841, 0.579, 0.341, 0.371],
            [0.615, 0.035, 0.378, 0.800, 0.601, 0.337, 0.358],
            [0.540, 0.079, 0.433, 0.765, 0.603, 0.312, 0.339],
            [0.467, 0.145, 0.490, 0.711, 0.610, 0.293, 0.329],
            [0.411, 0.185, 0.521, 0.680, 0.622, 0.278, 0.317],
        ],
        # left; below Z = 0.5 the medial extreme and the X of the front were set to those of a cavity without a heart,
        # which is cut out of it afterwards
        [
            [0.968, 0.010, 0.060, 0.955, 0.492, 0.497, 0.464],
            [0.942, 0.010, 0.055, 0.966, 0.490, 0.447, 0.454],
            [0.911, 0.010, 0.055, 0.974, 0.493, 0.400, 0.445],
            [0.886, 0.015, 0.061, 0.974, 0.510, 0.330, 0.425],
            [0.848, 0.020, 0.096, 0.958, 0.533, 0.278, 0.414],
            [0.807, 0.027, 0.147, 0.930, 0.547, 0.264, 0.396],
            [0.759, 0.054, 0.209, 0.894, 0.558, 0.310, 0.387],
            [0.700, 0.068, 0.303, 0.853, 0.588, 0.352, 0.373],
            [0.631, 0.092, 0.384, 0.810, 0.599, 0.338, 0.363],
            [0.552, 0.129, 0.436, 0.773, 0.619, 0.322, 0.345],
            [0.467, 0.182, 0.494, 0.723, 0.627, 0.304, 0.323],
            [0.415, 0.216, 0.532, 0.693, 0.631, 0.292, 0.316],
        ],
    ]
)
#: Standard deviations of the columns at the lowest, the middle (Z = 0.6) and the highest section, both sides pooled;
#: those of the medial and the front columns are narrowed where the heart, placed apart, makes them vary.
PROFILE_SD = np.array(
    [
        [0.016, 0.020, 0.018, 0.028, 0.037, 0.050, 0.050],
        [0.050, 0.040, 0.030, 0.028, 0.040, 0.060, 0.048],
        [0.075, 0.060, 0.042, 0.050, 0.045, 0.060, 0.065],
    ]
)
