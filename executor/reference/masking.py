"""What stands between the two products of attention: the scores' scale, the mask and the dropout.

Masks and dropout follow *global* positions, in any order: under context parallelism a rank holds scattered rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from executor.reference.arrays import Floats, Ints
from executor.reference.dropout import keep_mask, row_keys

UNLIMITED = 2**31 - 1


class Masking(NamedTuple):
    """Which keys each query sees, how their scores are scaled, and which probabilities are dropped.

    Attributes:
        scale: factor of the scores, usually 1 / sqrt(d).
        kv_index: the k/v head that each query head reads [h] (grouped-query attention, Ainslie et al. 2023), given
            explicitly because a tensor-parallel shard may hold an uneven part of the heads.
        causal: a query sees no later position.
        window: attention window in positions, or None; see `reach`.
        q_positions: global positions of the queries [Sq].
        k_positions: global positions of the keys [Sk].
        rate: dropout rate of the probabilities, in [0, 1).
        key: 64-bit key of this dropout.
        samples: global index of each sequence [B].
        head_ids: global index of each query head [h].
    """

    scale: float
    kv_index: Ints
    causal: bool
    window: int | None
    q_positions: Ints
    k_positions: Ints
    rate: float
    key: int
    samples: Ints
    head_ids: Ints

    @property
    def limited(self) -> bool:
        """Whether some query may not see some key."""
        return self.causal or self.window is not None

    @property
    def reach(self) -> tuple[int, int]:
        """How far a query sees (backward, forward), in positions.

        A window w means distances below w if causal, and at most w / 2 on either side if not.
        """
        if self.window is None:
            return UNLIMITED, 0 if self.causal else UNLIMITED
        return (self.window - 1, 0) if self.causal else (self.window // 2, self.window // 2)

    def of_keys(self, keys: slice) -> Masking:
        """The same for a block of the keys."""
        return self._replace(k_positions=self.k_positions[keys])

    def visible(self) -> npt.NDArray[np.bool_]:
        """Which keys each query sees, [Sq, Sk]."""
        back, ahead = self.reach
        distance = self.k_positions[None, :] - self.q_positions[:, None]
        seen: npt.NDArray[np.bool_] = (distance >= -back) & (distance <= ahead)
        return seen

    def dropout_factors(self, dtype: np.dtype[Any]) -> Floats:
        """Factors 0 or 1/(1 - rate) of the probabilities, [B, h, Sq, Sk]; the column is the key's position."""
        samples, heads = self.samples[:, None, None], self.head_ids[None, :, None]
        kept = keep_mask(
            row_keys(self.key, samples, self.q_positions[None, None, :], heads), self.k_positions, self.rate
        )
        factors: Floats = kept.astype(dtype) * dtype.type(1.0 / (1.0 - self.rate))
        return factors
