"""Dynamic loss scaling: the state machine that keeps float16 gradients between underflow and overflow.

The gradient of the loss is multiplied by a power of two, which float16's 5 exponent bits need so that small gradients
do not become zero, and the gradients of the parameters, in float32, are divided by it before anything reads them. A
gradient that is not finite on any rank skips the step on all of them (Micikevicius et al. 2018, arXiv:1710.03740,
section 3.2).

Every rank holds a scaler of its own and feeds it the same verdict, so that all scales are equal without a message.
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.errors import DataError

INITIAL_SCALE = 2.0**16  # torch.amp.GradScaler, Apex
GROWTH = 2.0  # torch.amp.GradScaler
BACKOFF = 0.5  # torch.amp.GradScaler
GROWTH_INTERVAL = 2000  # steps without overflow; Micikevicius et al. 2018, torch.amp.GradScaler
MINIMUM_SCALE = 1.0  # Megatron-LM's --min-loss-scale
MAXIMUM_SCALE = 2.0**127  # the largest power of two in float32; GradScaler stops at the same


@dataclass
class LossScaler:
    """The loss scale of a run.

    Attributes:
        scale: what the next step's loss gradient is multiplied by.
        good_steps: steps without overflow since the scale last changed.
    """

    scale: float = INITIAL_SCALE
    good_steps: int = 0

    def update(self, step: int, *, overflow: bool) -> None:
        """Take the verdict of a step: halve after an overflow, double after 2000 good steps.

        Raises:
            DataError: an overflow at the smallest scale, which nothing here can cure (fairseq ends a run the same way).
        """
        if not overflow:
            self.good_steps += 1
            if self.good_steps == GROWTH_INTERVAL:
                self.scale, self.good_steps = min(self.scale * GROWTH, MAXIMUM_SCALE), 0
            return
        if self.scale <= MINIMUM_SCALE:
            raise DataError(
                f"float16 overflows in step {step + 1} at loss scale {self.scale:g}, the smallest: a value is beyond "
                f"65504 without any scaling; train with --precision bfloat16, or with a smaller learning rate"
            )
        self.scale, self.good_steps = max(self.scale * BACKOFF, MINIMUM_SCALE), 0
