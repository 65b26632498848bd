"""Config files: a round trip keeps every value, and errors name field, value and allowed values."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from training.config import ConfigError, DistillConfig, config_as_toml, load_config, with_changes
from training.pretrained.presets import PRESETS, as_dmd2, as_lcm, as_tcd

VARIANTS = {
    **PRESETS,
    "default": DistillConfig(),
    "DMD2": as_dmd2(PRESETS["sd15"]),
    "LCM": as_lcm(PRESETS["sd15"]),
    "TCD, adapters": as_tcd(PRESETS["sd15-lora"]),
    "not a default": replace(
        DistillConfig(),
        timesteps={2: (999.0, 400.5), 1: (999.0,)},
        betas=(0.5, 0.9),
        gradient_checkpointing=True,
        step_counts=(1, 2),
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_config_written_to_a_file_is_read_back_equal(name: str, tmp_path: Path) -> None:
    config, file = VARIANTS[name], tmp_path / "config.toml"
    file.write_text(config_as_toml(config))
    for start in (DistillConfig(), PRESETS["cogvideox-2b"]):
        assert load_config(start, file) == config


def test_a_file_changes_only_the_fields_in_it(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('batch_size = 8\nguidance_scale = 4\naccumulation = 2\nstep_condition_for = "student"\n')
    expected = replace(PRESETS["sd15"], batch_size=8, guidance_scale=4.0, accumulation=2, step_condition_for="student")
    assert load_config(PRESETS["sd15"], file) == expected
    assert load_config(PRESETS["sd15"], None) is PRESETS["sd15"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize = 8", r"unknown fields \['batchsize'\]; known are .*'batch_size'"),
        ("batch_size = 8.0", "batch_size is 8.0; it must be of type int"),
        ('batch_size = "8"', "batch_size is '8'; it must be of type int"),
        ("batch_size = true", "batch_size is True; it must be of type int"),
        ("batch_size = 0", "batch_size is 0; it must be at least 1"),
        ("gradient_checkpointing = 1", "gradient_checkpointing is 1; it must be of type bool"),
        ("accumulation = 3", "accumulation is 3; it must be a divisor of batch_size, 32"),
        ('method = "tmd"', "method is 'tmd'; it must be one of tdm, lcm, tcd"),
        ('step_condition_for = "teacher"', "step_condition_for is 'teacher'; it must be one of both, student, none"),
        ('solver = "heun"', "solver is 'heun'; it must be one of ddim, euler, dpmsolver"),
        ('precision = "fp16"', "precision is 'fp16'; it must be one of bf16, fp32"),
        ("interval = []", r"interval is \[\]; it must be one of disjoint, reverse, full"),
        ("step_counts = []", r"step_counts is \(\); it must be a list of numbers from 1 to 16"),
        ("step_counts = 4", "step_counts is 4; it must be a list of numbers"),
        ("step_counts = [0, 4]", r"step_counts is \(0, 4\); it must be a list of numbers from 1 to 16"),
        ("step_counts = [4, 17]", r"step_counts is \(4, 17\); it must be a list of numbers from 1 to 16"),
        ("step_counts = [1.5]", "step_counts is 1.5; it must be of type int"),
        ("betas = [0.0]", r"betas is \(0.0,\); it must be two numbers in \[0, 1\)"),
        ("betas = [0.0, 1.0]", r"betas is \(0.0, 1.0\); it must be two numbers in \[0, 1\)"),
        ("student_learning_rate = nan", "student_learning_rate is nan; it must be a finite number of at least 0"),
        ("fake_learning_rate = -1e-5", "fake_learning_rate is -1e-05; it must be a finite number"),
        ("guidance_scale = inf", "guidance_scale is inf; it must be a finite number"),
        ("clip_norm = 0.0", "clip_norm is 0.0; it must be above 0"),
        ("ema_decay = 1.0", r"ema_decay is 1.0; it must be in \[0, 1\)"),
        ("warmup_steps = -1", "warmup_steps is -1; it must be at least 0"),
        ("timesteps = [999.0]", r"timesteps is \[999.0\]; it must be a table from step count to a list of timesteps"),
        ("[timesteps]\nfour = [1.0]", "timesteps is .*four.*; it must be a table from step count to"),
        ('[timesteps]\n1 = ["999"]', "timesteps is .*'999'.*; it must be a table from step count to"),
        ("[timesteps]\n2 = [999.0]", r"timesteps is \{2: \(999.0,\)\}; it must be 2 timesteps for 2 steps"),
        (
            'base_precision = "bf16"',
            r"base_precision 'bf16' is for LoRA .* set lora_rank \(now 0\) above 0 and precision",
        ),
        ('base_precision = "bf16"\nlora_rank = 4\nprecision = "fp32"', r"precision \(now fp32\) to bf16"),
        ('generator_loss = "fisher"\nlora_rank = 4', r"generator_loss 'fisher' .* set lora_rank \(now 4\) to 0"),
        ("adversarial_weight = 0.1\nlora_rank = 4", r"adversarial_weight needs .* set lora_rank \(now 4\) or"),
        ("batch_size = ", "is not TOML"),
        ("batch_size = \xff", "is not TOML"),
    ],
)
def test_an_invalid_file_is_rejected_with_field_and_value(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(DistillConfig(), file)
    assert str(file) in str(caught.value)


def test_the_error_for_a_missing_file_names_it(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"absent.toml cannot be read \(No such file or directory\); give a TOML file"
    ):
        load_config(DistillConfig(), tmp_path / "absent.toml")


def test_fields_are_checked_after_all_changes() -> None:
    assert with_changes(DistillConfig(), {"batch_size": 9, "accumulation": 3}).accumulation == 3


def test_presets_have_the_numbers_of_the_papers_appendix_d() -> None:
    rates = {
        name: (config.student_learning_rate, config.fake_learning_rate, config.batch_size, config.guidance_scale)
        for name, config in PRESETS.items()
    }
    assert rates["sd15"] == rates["sd15-4step"] == (2e-6, 2e-5, 256, 3.5)
    assert rates["sdxl-512"] == rates["sdxl"] == (1e-4, 4e-4, 64, 8.0)  # LoRA; all weights: 1e-6, 5e-6
    assert rates["pixart-alpha"] == rates["pixart-alpha-1024"] == (2e-6, 2e-5, 32, 3.5)
    steps = {name: config.steps for name, config in PRESETS.items()}
    assert (steps["sd15"], steps["sd15-4step"], steps["pixart-alpha"]) == (20_000, 3_000, 500)
    assert steps["sdxl-512"] == steps["sdxl"] == 1_000
    for config in PRESETS.values():
        assert config.betas == (0.0, 0.999) and config.clip_norm == 1.0 and config.final_lr_share == 1.0
        assert config.step_condition_for == ("both" if len(config.step_counts) > 1 else "none")


def test_as_dmd2_sets_its_fields_and_keeps_the_learning_rate() -> None:
    config = as_dmd2(PRESETS["sd15"])
    assert (config.fake_updates, config.interval, config.matching) == (10, "full", "clean")
    assert config.step_condition_for == "none"
    assert (config.rollout, config.generator_loss, config.fake_target) == ("stochastic", "normalised_l2", "clean")
    assert config.student_learning_rate == PRESETS["sd15"].student_learning_rate


def test_lcm_and_tcd_learn_from_latents_without_k_and_only_lcm_samples_with_noise() -> None:
    lcm, tcd = as_lcm(PRESETS["sd15"]), as_tcd(PRESETS["sd15"])
    assert (lcm.needs_latents, tcd.needs_latents, PRESETS["sd15"].needs_latents) == (True, True, False)
    assert (lcm.samples_with_noise, tcd.samples_with_noise) == (True, False)
    assert not lcm.student_receives_k and not tcd.student_receives_k
    assert replace(tcd, method="lcm") == lcm
