"""`SchedulerConfig`: a stock `scheduler_config.json`, with its class's defaults where it is silent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tdm_runtime.errors import RecipeError, shown
from tdm_runtime.sampling.schedule import Array, DiffusionSchedule

Settings = Mapping[str, Any]
SIGNAL_KEPT = 2.0**-24
"""Floor of alphas_cumprod that Euler and DPM-Solver++ keep at zero terminal SNR."""
KARRAS_RHO = 7.0

_BETAS: Settings = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}
_LATENT_BETAS: Settings = {**_BETAS, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
_SIGMA_CURVES: Settings = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_SPACED: Settings = {"steps_offset": 0, "rescale_betas_zero_snr": False}
_CONSISTENCY: Settings = {
    **_LATENT_BETAS,
    "rescale_betas_zero_snr": False,
    "original_inference_steps": 50,
    "timestep_scaling": 10.0,
    "clip_sample": False,
    "thresholding": False,
}

DEFAULTS: Mapping[str, Settings] = {
    "DDIMScheduler": {
        **_BETAS,
        **_SPACED,
        "clip_sample": True,
        "thresholding": False,
        "set_alpha_to_one": True,
        "timestep_spacing": "leading",
    },
    "CogVideoXDDIMScheduler": {
        **_LATENT_BETAS,
        **_SPACED,
        "set_alpha_to_one": True,
        "snr_shift_scale": 3.0,
        "timestep_spacing": "leading",
    },
    "CogVideoXDPMScheduler": {
        **_LATENT_BETAS,
        **_SPACED,
        "set_alpha_to_one": True,
        "snr_shift_scale": 3.0,
        "timestep_spacing": "leading",
    },
    "EulerDiscreteScheduler": {
        **_BETAS,
        **_SPACED,
        **_SIGMA_CURVES,
        "interpolation_type": "linear",
        "timestep_spacing": "linspace",
        "timestep_type": "discrete",
        "sigma_min": None,
        "sigma_max": None,
        "final_sigmas_type": "zero",
    },
    "EulerAncestralDiscreteScheduler": {**_BETAS, **_SPACED, "timestep_spacing": "linspace"},
    "DPMSolverMultistepScheduler": {
        **_BETAS,
        **_SPACED,
        **_SIGMA_CURVES,
        "solver_order": 2,
        "thresholding": False,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "lower_order_final": True,
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "use_flow_sigmas": False,
        "flow_shift": 1.0,
        "final_sigmas_type": "zero",
        "lambda_min_clipped": -math.inf,
        "variance_type": None,
        "timestep_spacing": "linspace",
        "use_dynamic_shifting": False,
    },
    "UniPCMultistepScheduler": {
        **_BETAS,
        **_SIGMA_CURVES,
        "solver_order": 2,
        "thresholding": False,
        "predict_x0": True,
        "solver_type": "bh2",
        "lower_order_final": True,
        "disable_corrector": [],
        "solver_p": None,
        "use_flow_sigmas": False,
        "flow_shift": 1.0,
        "final_sigmas_type": "zero",
        "use_dynamic_shifting": False,
        "shift_terminal": None,
    },
    "LCMScheduler": _CONSISTENCY,
    "TCDScheduler": _CONSISTENCY,
    "FlowMatchEulerDiscreteScheduler": {
        **_SIGMA_CURVES,
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "use_dynamic_shifting": False,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
        "invert_sigmas": False,
        "shift_terminal": None,
        "time_shift_type": "exponential",
        "stochastic_sampling": False,
    },
    "SCMScheduler": {"num_train_timesteps": 1000, "prediction_type": "trigflow", "sigma_data": 0.5},
}
"""Class -> settings that decide its samples, with diffusers' defaults."""

NULLABLE = ("base_shift", "max_shift")
"""Numbers that may be null; they are then unread."""
REFUSED: Mapping[str, str] = {
    "PNDMScheduler": "it calls the model K + 1 times in K steps and combines up to four outputs; "
    "save the folder with DDIMScheduler, which takes the same timesteps",
    "PeRFlowScheduler": "its authors sample PeRFlow with classifier-free guidance, which this server does not run; "
    "use another checkpoint",
}
"""Class -> why its samples cannot be made exactly, and the remedy."""


@dataclass(frozen=True)
class SchedulerConfig:
    """Class name and settings of a stock scheduler."""

    class_name: str
    settings: Settings

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> SchedulerConfig:
        """Read the content of scheduler_config.json.

        Raises:
            RecipeError: this version cannot follow the class.
        """
        name = raw.get("_class_name")
        if isinstance(name, str) and name in REFUSED:
            raise RecipeError(f"_class_name is {name}, which cannot be followed exactly: {REFUSED[name]}")
        if not isinstance(name, str) or name not in DEFAULTS:
            raise RecipeError(
                f"_class_name is {shown(name)}; this version follows {', '.join(DEFAULTS)}: save the folder with one "
                "of them, or write its recipe"
            )
        given = {key: raw[key] for key in raw if key in DEFAULTS[name]}
        for key, value in given.items():
            _check_type(key, value, DEFAULTS[name][key])
        return cls(name, {**DEFAULTS[name], **given})

    def __getitem__(self, setting: str) -> Any:
        return self.settings[setting]

    def require(self, setting: str, *allowed: object) -> None:
        """Check a setting that this version follows at some values only; one that the class lacks is fine.

        Raises:
            RecipeError: naming the setting, its value and what is allowed.
        """
        value = self.settings.get(setting, allowed[0])
        if value not in allowed:
            raise RecipeError(
                f"{setting} of the {self.class_name} is {shown(value)}; this version follows "
                f"{' or '.join(map(str, allowed))} only: save the scheduler so, or use another"
            )

    def diffusion_schedule(self, min_alpha_cumprod: float = 0.0) -> DiffusionSchedule:
        """Return the schedule of its betas.

        Args:
            min_alpha_cumprod: Floor that the class keeps after the rescale to zero terminal SNR.
        """
        self.require("trained_betas", None)
        rescale = bool(self.settings.get("rescale_betas_zero_snr"))
        return DiffusionSchedule(
            beta_schedule=self["beta_schedule"],
            beta_start=self["beta_start"],
            beta_end=self["beta_end"],
            num_train_timesteps=self["num_train_timesteps"],
            rescale_zero_terminal_snr=rescale,
            min_alpha_cumprod=min_alpha_cumprod if rescale else 0.0,
            snr_shift_scale=self.settings.get("snr_shift_scale", 1.0),
        )

    def final_sigmas_type(self) -> str:
        """Return "zero" or "sigma_min": where the last step lands."""
        self.require("final_sigmas_type", "zero", "sigma_min")
        return str(self["final_sigmas_type"])

    def sigma_curve(self, highest: float, lowest: float, k: int) -> Array:
        """Return K sigmas between two ends: Karras et al. 2022, eq. 5, or evenly spaced in their logarithm."""
        rho = KARRAS_RHO
        if self["use_karras_sigmas"]:
            curve: Array = np.linspace(highest ** (1 / rho), lowest ** (1 / rho), k) ** rho
            return curve
        return np.exp(np.linspace(math.log(highest), math.log(lowest), k))


def _check_type(setting: str, value: object, default: object) -> None:
    """Check that a setting has the type of its default; null is fine where the class may leave it out."""
    if default is None or (value is None and (isinstance(default, bool) or setting in NULLABLE)):
        return
    kinds: tuple[type, ...] = (int, float) if type(default) is float else (type(default),)
    if type(value) not in kinds:
        raise RecipeError(f"{setting} is {shown(value)}; it must be a {kinds[-1].__name__}, such as {default!r}")
