"""The hypervolume that points would add to a front: what a search wants to know of everything that it has not measured.

All objectives are minimised here. Hypervolume is that of Zitzler and Thiele (1998): between the front and a reference
point, the part that is dominated.
"""

from __future__ import annotations

import numpy as np


class Gain:
    """Of a front: its free part below the reference is cut into columns, boxes without end in the last objective, once;
    what a point adds is its share of each (as in Yang et al. 2019, section 3, for the exact expected improvement)."""

    def __init__(self, front: np.ndarray, reference: np.ndarray) -> None:
        """front: (n, m) points, dominated ones too; reference: (m,). Cuts (n + 1)^(m - 1) columns."""
        front = front[np.all(front < reference, axis=1)]
        self._reference = reference
        self._edges = [
            np.concatenate([[-np.inf], np.unique(front[:, axis]), [reference[axis]]])
            for axis in range(len(reference) - 1)
        ]
        lows = np.meshgrid(*(edges[:-1] for edges in self._edges), indexing="ij")
        dominates = np.ones((*lows[0].shape, len(front)), dtype=bool)
        for axis, low in enumerate(lows):
            dominates &= front[:, axis] <= low[..., None]
        heights = np.where(dominates, front[:, -1], reference[-1])
        self._tops = heights.min(axis=-1, initial=reference[-1])
        """Of each column: up to where it is free."""

    def of(self, points: np.ndarray) -> np.ndarray:
        """points: (k, m) -> (k,), each by itself; 0 for those that are not better than the reference."""
        shares = []
        for axis, edges in enumerate(self._edges):
            low = np.maximum(points[:, axis, None], edges[None, :-1])
            shares.append(np.maximum(edges[None, 1:] - low, 0.0))
        gains = np.maximum(self._tops[None] - points[:, -1].reshape(-1, *(1,) * self._tops.ndim), 0.0)
        for axis, share in enumerate(shares):
            gains = gains * share.reshape(-1, *(1,) * axis, share.shape[1], *(1,) * (len(shares) - axis - 1))
        return gains.reshape(len(points), -1).sum(axis=1)
