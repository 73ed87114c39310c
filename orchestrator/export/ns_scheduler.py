"""theta as a scheduler of diffusers: drops into an unchanged pipeline. The only module that defines a diffusers class.

Pipelines that were saved with it name this module, so it must be importable where they are loaded.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from solvers.ns import NSSolver
from solvers.prediction import Prediction, PredictionField
from solvers.schedulers import CondOT, Cosine, DiscreteVP, Scheduler

FLOW = "flow_prediction"
_CONTINUOUS: dict[bool, Scheduler] = {True: CondOT(), False: Cosine()}
"""The path of what has no betas, by whether it is a flow."""


class NSSchedulerOutput(NamedTuple):
    """What :meth:`NSScheduler.step` returns.

    Attributes:
        prev_sample: The next state, of the shape and dtype of the one before.
    """

    prev_sample: Tensor


class NSScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]  # diffusers combines them so itself
    """A non-stationary solver (BNS eq. 11, Algorithm 1) as a diffusers scheduler.

    Step k turns the pipeline's output, after guidance, into the velocity u_k and gives
    x_{k+1} = a_{k+1} x0 + sum_j b_{k+1,j} u_j. Sums are in float32 (float64 for float64 samples).

    The first state is a_0 x0. Pipelines that multiply their noise by ``init_noise_sigma`` = a_0 (Stable Diffusion 1, 2,
    XL) start there from x0 itself; others start from their noise, and x0 is that noise divided by a_0.

    Timesteps are real-valued, and may repeat or return, as theta's times do. Only deterministic sampling of the whole
    path is possible: no eta, no clipping or thresholding, no start in the middle (image to image).

    Args:
        times: theta's t_0..t_{n-1}, t=0 noise and t=1 data.
        a: Weights of x0, n + 1 numbers.
        b: Rows 0..n of the lower triangle; row k has k numbers.
        prediction_type: 'epsilon', 'sample', 'v_prediction' or 'flow_prediction' (noise minus data).
        trained_betas: The betas the network was trained with; None for flows, and for a v prediction on the continuous
            cosine path (Stable Audio), whose timesteps are 1 - t.
        num_train_timesteps: Timesteps of training.
        guidance_scale: Guidance that theta was made for: what to call the pipeline with.
        model_digest: Model that theta was made for.
        use_flow_sigmas: Whether it is a flow; flow pipelines then leave the grid to the scheduler.

    Raises:
        InvalidThetaError: The numbers are those of no solver.
        ValueError: A prediction type that is unknown or does not suit ``trained_betas``.
    """

    order = 1
    _compatibles: list[str] = []  # noqa: RUF012 (diffusers reads it so)

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        times: list[float],
        a: list[float],
        b: list[list[float]],
        prediction_type: str,
        trained_betas: list[float] | None = None,
        num_train_timesteps: int = 1000,
        guidance_scale: float = 1.0,
        model_digest: str | None = None,
        use_flow_sigmas: bool = False,
    ):
        flow = prediction_type == FLOW
        if prediction_type not in ("epsilon", "sample", "v_prediction", FLOW):
            raise ValueError(
                f"prediction_type {prediction_type!r} is unknown; choose epsilon, sample, v_prediction or {FLOW}"
            )
        continuous = prediction_type == "v_prediction" and trained_betas is None
        if (flow or continuous) == (trained_betas is not None) or flow != use_flow_sigmas:
            raise ValueError(
                f"{FLOW} takes use_flow_sigmas and no trained_betas; epsilon and sample take trained_betas alone, "
                f"v_prediction those or none"
            )
        n = len(times)
        lower = torch.zeros(n + 1, n, dtype=torch.float64)
        for k, row in enumerate(b):
            lower[k, :k] = torch.tensor(row, dtype=torch.float64)
        self.solver = NSSolver(torch.tensor(times, dtype=torch.float64), torch.tensor(a, dtype=torch.float64), lower)
        self.native: Scheduler = DiscreteVP(betas=tuple(trained_betas)) if trained_betas else _CONTINUOUS[flow]
        self.predicts: Prediction = "velocity" if flow else prediction_type  # type: ignore[assignment]
        self._train_timesteps = num_train_timesteps
        self.init_noise_sigma = float(self.solver.a[0])
        self.num_inference_steps: int | None = None
        self._start(torch.device("cpu"))

    def _start(self, device: torch.device | str | None) -> None:
        times = self.solver.times
        if isinstance(self.native, DiscreteVP):
            timesteps = self.native.timestep(times)
        else:
            timesteps = (self._train_timesteps if self.predicts == "velocity" else 1) * (1 - times)
        self.timesteps = timesteps.to(device=device, dtype=torch.float32)
        self._x0: Tensor | None = None
        self._velocities: list[Tensor] = []

    @property
    def step_index(self) -> int:
        """Steps taken since :meth:`set_timesteps`."""
        return len(self._velocities)

    @property
    def begin_index(self) -> int:
        return 0

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Pipelines call it with 0.

        Raises:
            ValueError: Another start than the first step.
        """
        if begin_index != 0:
            raise ValueError(f"theta is a solver of the whole path and cannot begin at step {begin_index}; begin at 0")

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: str | torch.device | None = None, mu: float | None = None
    ) -> None:
        """Begin a sample.

        Args:
            num_inference_steps: theta's number of evaluations.
            device: Where the pipeline wants ``timesteps``.
            mu: The shift that FLUX and SD3 compute for a grid of their own; theta has its grid, so it is not used.

        Raises:
            ValueError: Another number of steps than theta's.
        """
        if num_inference_steps != self.solver.nfe:
            raise ValueError(
                f"this theta has {self.solver.nfe} steps, not {num_inference_steps}; call the pipeline with "
                f"num_inference_steps={self.solver.nfe}, or export a theta of {num_inference_steps} evaluations"
            )
        self.num_inference_steps = num_inference_steps
        self._start(device)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The state as it is: the network sees the path that it was trained on."""
        return sample

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        generator: Any = None,
        return_dict: bool = True,
    ) -> NSSchedulerOutput | tuple[Tensor]:
        """The next state.

        Args:
            model_output: The network's output after guidance, (B, C, ...); further channels (a variance) are left out.
            timestep: The one the network was asked at; steps are counted, since theta may ask twice at one time.
            sample: The state at which it was asked, (B, C, ...).
            eta, use_clipped_model_output, generator: Of stochastic samplers. Nothing is drawn, so a generator is of
                no effect; pipelines hand the one they drew the noise from to every scheduler.
            return_dict: Whether to give an output object or a tuple.

        Raises:
            ValueError: eta or clipping is asked for, or a step too many.
        """
        if eta != 0 or use_clipped_model_output:
            raise ValueError(
                f"theta is deterministic and linear: eta={eta:g} and use_clipped_model_output="
                f"{use_clipped_model_output} cannot be had; leave them at 0 and None"
            )
        k = self.step_index
        if self.num_inference_steps is None or k >= self.solver.nfe:
            raise ValueError(f"step {k + 1} of a theta of {self.solver.nfe} steps; call set_timesteps for a new sample")
        state = sample if sample.dtype == torch.float64 else sample.float()
        if self._x0 is None:
            self._x0 = state / self.init_noise_sigma
        self._velocities.append(self._velocity(model_output.to(state.dtype), state, self.solver.times[k]))
        following = self.solver.a[k + 1].to(state.dtype) * self._x0
        weights = self.solver.b[k + 1, : k + 1].to(device=state.device, dtype=state.dtype)
        following = (following + torch.tensordot(weights, torch.stack(self._velocities), dims=1)).to(sample.dtype)
        return NSSchedulerOutput(following) if return_dict else (following,)

    def _velocity(self, output: Tensor, state: Tensor, t: Tensor) -> Tensor:
        channels = 1 if state.ndim < 2 else state.shape[1]
        if state.ndim == 4 and output.shape[1] == 2 * channels:
            output = output[:, :channels]
        if self.predicts == "velocity":
            output = -output  # diffusers' flows point from data to noise
        return PredictionField(lambda x, t: output, self.predicts, self.native)(state, t)

    def __len__(self) -> int:
        return self._train_timesteps
