"""AdamW (arXiv 1711.05101) on this rank's shards: fp32 master weights, decay of matrices only, clipping by the global norm (V3 4.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from quintet.errors import CheckpointError
from quintet.parallel.bucket import Bucket
from quintet.parallel.zero import ShardedParameters
from quintet.spec import run as spec

_BLOCK = 1 << 20
"""Elements whose bf16 moments are widened at one time."""


class AdamW:
    """The moments of every bucket's shard, and the update of its master."""

    def __init__(self, parameters: ShardedParameters, settings: spec.Optimizer) -> None:
        self.parameters, self.settings = parameters, settings
        dtype = torch.bfloat16 if settings.moments == "bf16" else torch.float32
        self.exp_avg = [torch.zeros_like(bucket.master, dtype=dtype) for bucket in parameters.buckets]
        self.exp_avg_sq = [torch.zeros_like(bucket.master, dtype=dtype) for bucket in parameters.buckets]
        # MTP modules may join late: they have made fewer updates.
        self.num_steps = {False: 0, True: 0}

    @torch.no_grad()
    def step(self, learning_rate: float, gradient_norm: float) -> None:
        """Clip to the largest norm, update the masters of the buckets that have a gradient, and the weights after them. Consumes the
        gradients."""
        scale = min(self.settings.clip_norm / (gradient_norm + 1e-6), 1.0)
        for is_mtp in (False, True) if self.parameters.with_mtp else (False,):
            self.num_steps[is_mtp] += 1
        for i, bucket in enumerate(self.parameters.buckets):
            if bucket.has_gradient:
                count = torch.tensor(float(self.num_steps[self.parameters.is_mtp[i]]), device=bucket.master.device)
                self._update(bucket, self.exp_avg[i], self.exp_avg_sq[i], learning_rate=learning_rate, scale=scale, count=count)
        self.parameters.publish()

    def _update(
        self, bucket: Bucket, exp_avg: Tensor, exp_avg_sq: Tensor, *, learning_rate: float, scale: float, count: Tensor
    ) -> None:
        for run, values, is_matrix in bucket.take_gradients():
            step = len(values) if exp_avg.dtype == torch.float32 else _BLOCK
            for begin in range(0, len(values), max(step, 1)):
                gradient = values[begin : begin + step]
                block = slice(run.start + begin, run.start + begin + len(gradient))
                moments = [exp_avg[block], exp_avg_sq[block]]
                if scale < 1.0:
                    gradient.mul_(scale)
                wide = [moment.float() for moment in moments]
                adamw(
                    [bucket.master[block]],
                    [gradient],
                    [wide[0]],
                    [wide[1]],
                    [],
                    # The kernel adds one to the count before it corrects the bias.
                    [count - 1],
                    fused=True,
                    amsgrad=False,
                    beta1=self.settings.beta1,
                    beta2=self.settings.beta2,
                    lr=learning_rate,
                    weight_decay=self.settings.weight_decay if is_matrix else 0.0,
                    eps=self.settings.eps,
                    maximize=False,
                )
                if wide[0] is not moments[0]:
                    for moment, value in zip(moments, wide, strict=True):
                        moment.copy_(value)

    def counts(self) -> dict[str, int]:
        """Updates so far, of the main model and of the MTP modules: what `restore_counts` takes."""
        return {"main": self.num_steps[False], "mtp": self.num_steps[True]}

    def restore_counts(self, counts: Mapping[str, Any]) -> None:
        """Continue the bias correction; the tensors are filled in place by the loader. Raises CheckpointError for impossible counts."""
        if sorted(counts) != ["main", "mtp"] or any(type(count) is not int or count < 0 for count in counts.values()):
            raise CheckpointError(f"the optimizer's step counts {dict(counts)} must be main and mtp, neither negative")
        self.num_steps = {False: counts["main"], True: counts["mtp"]}
