"""Diffusers scheduler that samples with theta in an unchanged pipeline. The only module that defines a diffusers class.

A pipeline saved with this scheduler refers to this module, so the package must be installed where it is loaded.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from solvers.guided import GuidedSolver
from solvers.ns import InvalidThetaError, NSSolver
from solvers.prediction import Prediction, PredictionField
from solvers.schedulers import CondOT, Cosine, DiscreteVP, Scheduler

FLOW = "flow_prediction"
_CONTINUOUS: dict[bool, Scheduler] = {True: CondOT(), False: Cosine()}
"""Path of models without betas, by whether the model is a flow."""


_WHOLE_PATH = (
    "theta is a solver of the whole path from pure noise, and there is none yet for this kind of pipeline; use the "
    "pipeline that theta was made for (text or class to image), or another scheduler here"
)


def _solver(times: list[float], a: list[float], b: list[list[float]]) -> NSSolver:
    """The solver of these numbers, in which row k of ``b`` has k values."""
    n = len(times)
    lower = torch.zeros(n + 1, n, dtype=torch.float64)
    for k, row in enumerate(b):
        lower[k, :k] = torch.tensor(row, dtype=torch.float64)
    return NSSolver(torch.tensor(times, dtype=torch.float64), torch.tensor(a, dtype=torch.float64), lower)


class NSSchedulerOutput(NamedTuple):
    """Result of :meth:`NSScheduler.step`.

    Attributes:
        prev_sample: The next state, with the shape and dtype of the current one.
    """

    prev_sample: Tensor


class NSScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]  # diffusers combines them in the same way
    """A non-stationary solver (BNS eq. 11, Algorithm 1) as a diffusers scheduler.

    Step k converts the network's output, after guidance, to the velocity u_k and returns
    x_{k+1} = a_{k+1} x0 + sum_j b_{k+1,j} u_j. Sums are in float32 (float64 for float64 samples).

    The first state is a_0 x0. x0 is the noise itself in pipelines that multiply it by ``init_noise_sigma`` = a_0
    (Stable Diffusion 1, 2, XL, Stable Audio), and, with ``scales_input``, in those that leave all scaling to
    :meth:`scale_model_input` (DiT). Other pipelines start at their noise, and x0 is that noise divided by a_0, which
    the exporter therefore only accepts near 1.

    Timesteps are real-valued. Like theta's times, they may repeat or run backwards. Only deterministic sampling of the
    whole path from noise is supported. Refused are eta, clipping, a start in the middle or at an image with noise
    (image to image), and changes of the state between steps (inpainting, callbacks). A pipeline that ends early, as
    SDXL's with ``denoising_end``, cannot be recognised: what it returns is not a sample.

    Args:
        times: theta's t_0..t_{n-1}, with t=0 noise and t=1 data.
        a: Weights of x0, n + 1 values.
        b: Rows 0..n of the lower triangle; row k has k values.
        prediction_type: 'epsilon', 'sample', 'v_prediction' or 'flow_prediction' (noise minus data).
        trained_betas: The betas the network was trained with; None for flows, and for a v prediction on the continuous
            cosine path (Stable Audio), whose timesteps are 1 - t.
        num_train_timesteps: Number of timesteps in training.
        guidance_scale: Guidance scale that theta was made for, or that was chosen in its range; call the pipeline with
            it. None: none was chosen yet (:meth:`at`).
        model_digest: Digest of the model that theta was made for.
        use_flow_sigmas: Whether the model is a flow; flow pipelines then leave the grid to the scheduler.
        scales_input: Whether the pipeline ignores ``init_noise_sigma``, and hands what :meth:`scale_model_input`
            returns to its network and to :meth:`step`.
        guidance_range: The two ends of the range of scales that theta was made for; None for a single scale.
        upper_times, upper_a, upper_b: For a range: theta's numbers at its upper end; ``times``, ``a`` and ``b`` are
            those of its lower end, and those of a scale lie between them.

    Raises:
        InvalidThetaError: ``times``, ``a`` and ``b`` are not a valid solver.
        ValueError: The prediction type is unknown or does not suit ``trained_betas``.
    """

    order = 1
    _compatibles: list[str] = []  # noqa: RUF012 (diffusers expects a class attribute)

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        times: list[float],
        a: list[float],
        b: list[list[float]],
        prediction_type: str,
        trained_betas: list[float] | None = None,
        num_train_timesteps: int = 1000,
        guidance_scale: float | None = 1.0,
        model_digest: str | None = None,
        use_flow_sigmas: bool = False,
        scales_input: bool = False,
        guidance_range: list[float] | None = None,
        upper_times: list[float] | None = None,
        upper_a: list[float] | None = None,
        upper_b: list[list[float]] | None = None,
    ):
        flow = prediction_type == FLOW
        if prediction_type not in ("epsilon", "sample", "v_prediction", FLOW):
            raise ValueError(
                f"prediction_type {prediction_type!r} is unknown; choose epsilon, sample, v_prediction or {FLOW}"
            )
        continuous = prediction_type == "v_prediction" and trained_betas is None
        if (flow or continuous) == (trained_betas is not None) or flow != use_flow_sigmas:
            raise ValueError(
                f"prediction_type does not suit trained_betas and use_flow_sigmas: {FLOW} takes use_flow_sigmas and no "
                f"trained_betas, epsilon and sample take only trained_betas, v_prediction takes trained_betas or "
                f"neither"
            )
        solver = _solver(times, a, b)
        self._guided: GuidedSolver | None = None
        if guidance_range is not None:
            upper = _solver(upper_times or [], upper_a or [], upper_b or [])
            self._guided = GuidedSolver(solver, upper, (guidance_range[0], guidance_range[1]))
            # Without a scale, set_timesteps refuses to begin a sample.
            solver = self._guided.at(guidance_range[0] if guidance_scale is None else guidance_scale)
        self._scale = guidance_scale
        self._pipeline: weakref.ref[Any] | None = None
        self.native: Scheduler = DiscreteVP(betas=tuple(trained_betas)) if trained_betas else _CONTINUOUS[flow]
        self.predicts: Prediction = "velocity" if flow else prediction_type  # type: ignore[assignment]
        self._train_timesteps = num_train_timesteps
        self._scales_input = scales_input
        self._use(solver)
        self.num_inference_steps: int | None = None
        self._start(torch.device("cpu"))

    def _use(self, solver: NSSolver) -> None:
        self.solver = solver
        self._first = float(solver.a[0])
        self.init_noise_sigma = 1.0 if self._scales_input else self._first

    def at(self, guidance_scale: float) -> NSScheduler:
        """The scheduler for a pipeline that is called with ``guidance_scale``, which theta's range must hold.

        Raises:
            InvalidThetaError: theta was not made for this scale.
        """
        if self._guided is None and guidance_scale != self._scale:
            raise InvalidThetaError(
                f"this theta was made for guidance_scale {self._scale:g}, not {guidance_scale:g}; call the pipeline "
                f"with {self._scale:g}, or distil one for {guidance_scale:g}"
            )
        scheduler: NSScheduler = NSScheduler.from_config(self.config, guidance_scale=float(guidance_scale))
        scheduler._pipeline = self._pipeline
        return scheduler

    def watch(self, pipe: Any) -> None:
        """Use the guidance scale of each call of ``pipe``, if its class states it (``pipe.guidance_scale``).

        theta of a range takes that scale unless one was chosen; a scale that theta or the choice does not suit is
        refused. Pipelines that keep the scale to themselves, such as DiT's, cannot be checked.
        """
        self._pipeline = weakref.ref(pipe)

    def _choose_scale(self) -> None:
        """Set the solver of the guidance scale that was chosen, or that the pipeline states for this call.

        Raises:
            InvalidThetaError: None was chosen or stated, they differ, or theta was not made for it.
        """
        stated = None if self._pipeline is None else getattr(self._pipeline(), "guidance_scale", None)
        if stated is not None and self._scale is not None and max(stated, 1) != max(self._scale, 1):
            raise InvalidThetaError(
                f"the pipeline was called with guidance_scale {stated:g}, but its scheduler is for {self._scale:g}; "
                f"call it with guidance_scale={self._scale:g}"
                + (f", or set pipe.scheduler = pipe.scheduler.at({stated:g})" if self._guided is not None else "")
            )
        if self._guided is None:
            return
        scale = stated if self._scale is None else self._scale
        if scale is None:
            low, high = self._guided.guidance_range
            raise InvalidThetaError(
                f"this theta is for every guidance scale from {low:g} to {high:g}, and the pipeline does not pass its "
                f"own to the scheduler; choose it first: pipe.scheduler = pipe.scheduler.at({high:g})"
            )
        self._use(self._guided.at(scale))

    def _start(self, device: torch.device | str | None) -> None:
        times = self.solver.times
        if isinstance(self.native, DiscreteVP):
            timesteps = self.native.timestep(times)
        else:
            timesteps = (self._train_timesteps if self.predicts == "velocity" else 1) * (1 - times)
        self.timesteps = timesteps.to(device=device, dtype=torch.float32)
        self._begins_at = float(timesteps[0])
        self._x0: Tensor | None = None
        self._scaled = not self._scales_input
        self._returned: Tensor | None = None
        self._state: Tensor | None = None
        self._velocities: list[Tensor] = []

    @property
    def step_index(self) -> int:
        """Number of steps taken since :meth:`set_timesteps`."""
        return len(self._velocities)

    @property
    def begin_index(self) -> int:
        return 0

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Accept 0, the only value that pipelines pass for a sample from noise.

        Raises:
            ValueError: ``begin_index`` is not 0.
        """
        if begin_index != 0:
            raise ValueError(f"the pipeline begins at step {begin_index}, but {_WHOLE_PATH}")

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Refused: pipelines mix noise and an image to begin there, or to keep parts of the image (inpainting).

        Raises:
            ValueError: Always.
        """
        raise ValueError(f"the pipeline adds noise to an image, as image-to-image and inpainting do, but {_WHOLE_PATH}")

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor | None = None) -> Tensor:
        """Refused as :meth:`add_noise`, whose name this is in flow pipelines."""
        return self.add_noise(sample, noise, timestep)  # type: ignore[arg-type]

    def __getattr__(self, name: str) -> Any:
        """Look up ``name`` in the configuration, as every diffusers scheduler does.

        Raises:
            AttributeError: Nothing has this name.
        """
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            raise AttributeError(f"NSScheduler has no {name!r}; a pipeline that needs it cannot use theta") from error

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        mu: float | None = None,
        sigmas: Any = None,
        timesteps: Any = None,
    ) -> None:
        """Begin a new sample.

        Args:
            num_inference_steps: Number of steps; must be theta's NFE.
            device: Device for ``timesteps``.
            mu: Shift that FLUX and SD3 compute for their own grids. Ignored, since theta has its own grid.
            sigmas, timesteps: Another grid, which the pipeline or its caller wants. Refused.

        Raises:
            ValueError: ``num_inference_steps`` is not theta's NFE, another grid is given, or theta's guidance scale is
                not known or not the pipeline's.
        """
        if sigmas is not None or timesteps is not None:
            raise ValueError(f"the pipeline was given, or makes, its own sigmas or timesteps, but {_WHOLE_PATH}")
        if num_inference_steps != self.solver.nfe:
            raise ValueError(
                f"this theta has {self.solver.nfe} steps, not {num_inference_steps}; call the pipeline with "
                f"num_inference_steps={self.solver.nfe}, or export a theta of {num_inference_steps} evaluations"
            )
        self._choose_scale()
        self.num_inference_steps = num_inference_steps
        self._start(device)

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """A copy of the state, which the network may change; of the noise x0, with ``scales_input``, a_0 x0."""
        if self._scaled:
            return sample.clone()
        self._scaled = True
        return self._first * sample

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
        """Take one step and return the next state.

        Args:
            model_output: The network's output after guidance, (B, C, ...); extra channels (a variance) are dropped.
            timestep: Timestep of the evaluation. The first must be theta's; then steps are counted, since theta's times
                may repeat.
            sample: The state at which the network was evaluated, (B, C, ...): the one that the last step returned.
            eta, use_clipped_model_output, generator: Arguments of stochastic samplers. Nothing is drawn here, so
                ``generator``, which pipelines pass to every scheduler, has no effect.
            return_dict: Whether to return an output object or a tuple.

        Raises:
            ValueError: eta or clipping is requested, all steps have been taken, the path does not begin at its
                beginning, the first state was not scaled, or the state has been changed since the last step.
        """
        if eta != 0 or use_clipped_model_output:
            raise ValueError(
                f"theta is deterministic and linear, so eta={eta:g} and use_clipped_model_output="
                f"{use_clipped_model_output} are not supported; leave them at 0 and None"
            )
        k = self.step_index
        if self.num_inference_steps is None or k >= self.solver.nfe:
            raise ValueError(f"step {k + 1} of a theta of {self.solver.nfe} steps; call set_timesteps for a new sample")
        given = self._own_state(sample, timestep)
        state = given if given.dtype == torch.float64 else given.float()
        if self._x0 is None:
            if not self._scaled:
                raise ValueError(
                    f"the pipeline does not call scale_model_input, but theta starts from {self._first:g} x0; use the "
                    f"pipeline that theta was exported for"
                )
            self._x0 = state / self._first
        self._velocities.append(self._velocity(model_output.to(state.dtype), state, self.solver.times[k]))
        following = self.solver.a[k + 1].to(state.dtype) * self._x0
        weights = self.solver.b[k + 1, : k + 1].to(device=state.device, dtype=state.dtype)
        following = (following + torch.tensordot(weights, torch.stack(self._velocities), dims=1)).to(sample.dtype)
        self._returned, self._state = following, following.clone()
        return NSSchedulerOutput(following) if return_dict else (following,)

    def _own_state(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """The state of this step as the last one computed it, which a network that works in place cannot have changed.

        Raises:
            ValueError: ``sample`` is another state, or the first step is not at theta's first timestep.
        """
        if self._state is None:
            if abs(float(timestep) - self._begins_at) > 1e-3 * max(1.0, abs(self._begins_at)):
                begun = f"the pipeline begins at timestep {float(timestep):g}, not at {self._begins_at:g}"
                raise ValueError(f"{begun}, but {_WHOLE_PATH}")
            return sample
        if sample is not self._returned:
            tolerance = 1e-4 if torch.finfo(sample.dtype).bits > 16 else 1e-2
            if not bool((sample - self._state).float().norm() <= tolerance * self._state.float().norm()):
                raise ValueError(
                    f"the state was changed before step {self.step_index + 1}, as inpainting and callbacks do, but "
                    f"{_WHOLE_PATH}"
                )
        return self._state

    def _velocity(self, output: Tensor, state: Tensor, t: Tensor) -> Tensor:
        channels = 1 if state.ndim < 2 else state.shape[1]
        if state.ndim == 4 and output.shape[1] == 2 * channels:
            output = output[:, :channels]
        if self.predicts == "velocity":
            output = -output  # velocities of diffusers' flows point from data to noise
        return PredictionField(lambda x, t: output, self.predicts, self.native)(state, t)

    def __len__(self) -> int:
        return self._train_timesteps
