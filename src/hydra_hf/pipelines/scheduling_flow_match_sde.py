"""Random steps of a rectified flow, with their log-probabilities: what policy gradients need (Flow-GRPO and others)."""

from dataclasses import dataclass

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SchedulerMixin,  # noqa: F401  a pipeline that is opened looks for this name in the file of its scheduler
)
from diffusers.configuration_utils import register_to_config
from diffusers.utils.outputs import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.distributions import Normal

from ..modeling.flow import sde_step
from .arguments import check_number


@dataclass
class FlowMatchSDESchedulerOutput(BaseOutput):
    """One step.

    Args:
        prev_sample: the sample at the next noise level, drawn from a normal distribution around `mean`.
        log_prob: (B,), see `FlowMatchSDEScheduler.log_prob`.
        mean, std: of the distribution, in the sample's shape.
    """

    prev_sample: Tensor
    log_prob: Tensor
    mean: Tensor
    std: Tensor


class FlowMatchSDEScheduler(FlowMatchEulerDiscreteScheduler):
    """
    `FlowMatchEulerDiscreteScheduler` with noise in every step, so that drawing is a policy whose steps have a probability.

    A step is one of Euler and Maruyama along the SDE of `modeling.flow.sde_step`, which has the flow's distribution at each
    noise level, with g = `noise_level` sqrt(t / (1 - t)) as in Flow-GRPO (Liu et al. 2025, arXiv 2505.05470); at t = 1, where that
    is infinite, t is the second noise level, as in its code (github.com/yifan123/flow_grpo). Every step is recorded.

    Args:
        noise_level: a in Flow-GRPO, which has 0.7. The last step's noise stays in the image; draw with the scheduler of Euler steps
            when the training is done.
    """

    _compatibles = ["FlowMatchEulerDiscreteScheduler"]

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, noise_level: float = 0.7):
        if check_number("noise_level", noise_level, high=10) == 0:
            raise ValueError("Got noise_level=0, expected more: steps without noise have no probability.")
        super().__init__(num_train_timesteps)
        self._samples, self._log_probs = [], []

    @property
    def trajectory(self) -> tuple[Tensor, Tensor]:
        """The recorded steps: samples (B, steps + 1, ...), from the first to the last, and their log-probabilities (B, steps)."""
        return torch.stack(self._samples, dim=1), torch.stack(self._log_probs, dim=1)

    def set_timesteps(self, *args, **kwargs) -> None:
        """As in diffusers; forgets the recorded steps."""
        super().set_timesteps(*args, **kwargs)
        self._samples, self._log_probs = [], []

    def distribution(self, model_output: Tensor, sample: Tensor, index: int) -> Normal:
        """What step number `index` draws from, for a velocity and a sample of the same shape."""
        sigma, next_sigma = self.sigmas[index], self.sigmas[index + 1]
        finite = torch.where(sigma < 1, sigma, self.sigmas[1])
        noise_rate = self.config.noise_level * (sigma / (1 - finite)) ** 0.5
        return Normal(*sde_step(sample.float(), model_output.float(), sigma, next_sigma, noise_rate))

    def log_prob(self, model_output: Tensor, sample: Tensor, prev_sample: Tensor, index: int) -> Tensor:
        """The logarithm (B,) of the probability density of a recorded step, given the velocity that a model now has for its sample.

        The mean over all values of a sample, not their sum, as in Flow-GRPO and DDPO: ratios stay near 1 whatever the size.
        """
        return self.distribution(model_output, sample, index).log_prob(prev_sample.float()).flatten(1).mean(dim=1)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> FlowMatchSDESchedulerOutput | tuple:
        """Draws the sample at the next noise level, from that at `timestep` and its velocity.

        Raises ValueError for a sample that is not what the last step drew: its probability would not be recorded.
        """
        if self.step_index is None:
            self._init_step_index(timestep)
        normal = self.distribution(model_output, sample, self.step_index)
        noise = randn_tensor(normal.mean.shape, generator=generator, device=sample.device, dtype=normal.mean.dtype)
        prev_sample = normal.mean + normal.stddev * noise
        log_prob = self.log_prob(model_output, sample, prev_sample, self.step_index)
        self._record(sample, prev_sample, log_prob)
        self._step_index += 1
        output = FlowMatchSDESchedulerOutput(prev_sample, log_prob, normal.mean, normal.stddev)
        return output if return_dict else output.to_tuple()

    def _record(self, sample: Tensor, prev_sample: Tensor, log_prob: Tensor) -> None:
        if self._samples and not torch.equal(self._samples[-1], sample.float()):
            raise ValueError("Got a sample that is not what the last step drew: a callback must not change latents.")
        self._samples = [*(self._samples or [sample.float()]), prev_sample]
        self._log_probs = [*self._log_probs, log_prob]
