"""The plane in which points of several coordinates are drawn: that of ground truth's two leading principal axes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from orchestrator.reports.drawing.style import Array


@dataclass(frozen=True)
class Plane:
    """Projects points onto a plane.

    Attributes:
        centre: Point that is projected to 0, (D,).
        axes: Orthonormal axes, (2, D).
        names: Labels of the two axes.
    """

    centre: Array
    axes: Array
    names: tuple[str, str]

    @classmethod
    def of(cls, truth: Array) -> Plane:
        """The plane of the two leading principal components of points (N, D); their own plane if D is 2.

        Points that are not finite do not count.
        """
        width = truth.shape[1]
        if width == 2:
            return cls(np.zeros(2), np.eye(2), ("coordinate 1", "coordinate 2"))
        points = truth[np.isfinite(truth).all(axis=1)]
        if len(points) < 3:
            return cls(np.zeros(width), np.eye(2, width), ("coordinate 1", "coordinate 2"))
        centre = points.mean(axis=0)
        _, lengths, axes = np.linalg.svd(points - centre, full_matrices=False)
        shares = 100 * lengths[:2] ** 2 / max(float((lengths**2).sum()), 1e-300)
        first, second = (f"principal component {i + 1} ({share:.0f} %)" for i, share in enumerate(shares))
        # The sign of an axis is arbitrary; with the largest entry positive, it does not change between machines.
        signs = np.sign(axes[np.arange(2), np.abs(axes[:2]).argmax(axis=1)])
        return cls(centre, axes[:2] * signs[:, None], (first, second))

    def project(self, points: Array) -> Array:
        """Coordinates in the plane, (N, 2), of points (N, D)."""
        projected: Array = (points - self.centre) @ self.axes.T
        return projected
