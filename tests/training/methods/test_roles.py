"""Teacher, student and fake score: what each network receives, and whose weights it has."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tdm_runtime.families.conditioning import Conditioning
from tdm_runtime.families.denoiser import Denoiser
from tdm_runtime.sampling.schedule import DiffusionSchedule, FlowSchedule
from tests.tiny_models import TINY_SHAPES, tiny_conditioning
from tests.training.methods.known import COORDINATES, EMPTY, SHAPE, KnownDenoiser, known, levels, normal
from tests.training.tiny_runs import tiny_base
from training.methods.losses import guided
from training.methods.precision import Precision
from training.methods.roles import CleanEstimator, Guided, LoraRoles, RoleProjection, SeparateRoles
from training.methods.trajectory import Coordinates

X, TIMESTEPS, K = normal(2, *SHAPE, seed=0), torch.tensor([700.0, 20.0]), torch.tensor([1, 4])
PROMPTS = Conditioning(torch.tensor([0.4, -0.3]).view(2, 1, 1))


# ---- estimates and guidance ----------------------------------------------------------------------


def test_guidance_moves_away_from_the_empty_prompt() -> None:
    assert guided(torch.tensor(3.0), torch.tensor(1.0), 2.5).item() == 6.0


@pytest.mark.parametrize("step_counts", [None, K])
def test_a_guided_estimate_is_beyond_the_prompts_as_seen_from_the_empty_prompts(step_counts: Tensor | None) -> None:
    """empty + scale (prompt - empty): the networks differ only by the prompt, so by scale times the prompts' gap."""
    guided_estimate = Guided(CleanEstimator(KnownDenoiser(0.5), COORDINATES, "fp32"), EMPTY, 2.5)
    found = guided_estimate(X, TIMESTEPS, PROMPTS, step_counts)
    expected = Conditioning(-0.6 + 2.5 * (PROMPTS.prompt_embeds + 0.6))
    torch.testing.assert_close(found, known(0.5, X, TIMESTEPS, expected, step_counts))


@pytest.mark.parametrize("step_counts", [None, K])
def test_a_guidance_scale_of_1_computes_only_the_prompts(step_counts: Tensor | None) -> None:
    sizes: list[int] = []

    class Counting(KnownDenoiser):
        def forward(self, x: Tensor, *arguments: Tensor) -> Tensor:  # type: ignore[override]
            sizes.append(len(x))
            return super().forward(x, *arguments)

    estimate = Guided(CleanEstimator(Counting(0.5), COORDINATES, "fp32"), EMPTY, 1.0)
    torch.testing.assert_close(
        estimate(X, TIMESTEPS, PROMPTS, step_counts), known(0.5, X, TIMESTEPS, PROMPTS, step_counts)
    )
    assert sizes == [2]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_an_estimate_is_the_clean_sample_of_the_model_output(prediction: str) -> None:
    schedule = DiffusionSchedule()
    (alpha, sigma), noise, x_0 = levels(TIMESTEPS), normal(2, *SHAPE, seed=1), normal(2, *SHAPE, seed=2)
    output = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x_0, "sample": x_0}[prediction]
    called = []

    class Fixed(nn.Module):
        def forward(self, x: Tensor, timesteps: Tensor, *_: object) -> Tensor:
            assert timesteps.dtype == torch.float32 and called == ["before"]
            return output

    coordinates = Coordinates(schedule, prediction)  # type: ignore[arg-type]
    estimate = CleanEstimator(Fixed(), coordinates, "fp32", lambda: called.append("before"))
    x = alpha * x_0 + sigma * noise
    torch.testing.assert_close(estimate(x, TIMESTEPS.double(), PROMPTS, None), x_0, rtol=1e-4, atol=1e-4)


def test_a_flow_estimate_is_the_clean_sample_of_the_velocity() -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor, *_: object) -> Tensor:
            return torch.full_like(x, 2.0)

    estimate = CleanEstimator(Fixed(), Coordinates(FlowSchedule(), "flow_prediction"), "fp32")
    expected = X - 2.0 * torch.tensor([0.7, 0.02]).view(2, 1, 1, 1)
    torch.testing.assert_close(estimate(X, TIMESTEPS, PROMPTS, None), expected)


def test_the_precision_of_an_estimate_is_the_one_that_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    enabled: list[bool] = []

    class Watching(KnownDenoiser):
        def forward(self, x: Tensor, *arguments: Tensor) -> Tensor:  # type: ignore[override]
            enabled.append(torch.is_autocast_enabled("cpu"))
            return super().forward(x, *arguments)

    for precision in ("fp32", "bf16"):
        roles = SeparateRoles(Watching(0.5), COORDINATES, precision=precision)  # type: ignore[arg-type]
        for estimate in (roles.teacher, roles.student, roles.fake):
            assert estimate(X, TIMESTEPS, PROMPTS, None).dtype == torch.float32
    assert enabled == [False] * 3 + [True] * 3


# ---- three copies --------------------------------------------------------------------------------


def test_separate_roles_are_copies_that_train_and_a_teacher_that_does_not() -> None:
    base = KnownDenoiser(0.9)
    roles = SeparateRoles(base, COORDINATES)
    assert roles.teacher.denoiser is base and not base.training and not base.gain.requires_grad
    for role, estimate in (("student", roles.student), ("fake", roles.fake)):
        module = roles.module(role)  # type: ignore[arg-type]
        assert estimate.denoiser is module and module.training
        assert isinstance(module, KnownDenoiser) and module.gain is not base.gain
        assert module.gain.requires_grad and module.gain.item() == pytest.approx(0.9)
    assert roles.module("student") is not roles.module("fake")
    assert roles.teacher.precision == roles.student.precision == roles.fake.precision == "bf16"
    assert CleanEstimator(base, COORDINATES).precision == "bf16"


def test_a_student_of_its_own_leaves_the_fake_score_at_the_base() -> None:
    student = KnownDenoiser(0.2)
    roles = SeparateRoles(KnownDenoiser(0.9), COORDINATES, student=student)
    assert roles.module("student") is student and roles.student.denoiser is student
    assert roles.fake.denoiser.gain.item() == pytest.approx(0.9)


# ---- two adapters on one base --------------------------------------------------------------------

FAMILY = "stable_diffusion"
LATENTS = normal(2, *TINY_SHAPES[FAMILY], seed=0)
TEXTS = tiny_conditioning(FAMILY, 2)


def lora_roles(precision: Precision, base_precision: Precision = "fp32") -> LoraRoles:
    """Return two untrained adapters on a tiny model with an input for K."""
    base = tiny_base(FAMILY)
    base.denoiser.add_step_condition(8)
    coordinates = Coordinates(base.noise_schedule, base.prediction_type)  # type: ignore[arg-type]
    return LoraRoles(base.denoiser, coordinates, rank=2, alpha=6.0, precision=precision, base_precision=base_precision)


@pytest.fixture
def lora() -> LoraRoles:
    return lora_roles("fp32")


@torch.no_grad()
def outputs(roles: LoraRoles) -> dict[str, Tensor]:
    """Return the estimates of all roles. The teacher receives no K, as in training."""
    return {
        role: getattr(roles, role)(LATENTS, TIMESTEPS, TEXTS, None if role == "teacher" else K)
        for role in ("teacher", "student", "fake")
    }


def plain_denoiser() -> Denoiser:
    return tiny_base(FAMILY).denoiser


@pytest.mark.parametrize("role", ["student", "fake"])
@pytest.mark.parametrize("part", ["lora_B", "cond_proj"])
def test_weights_of_a_role_change_its_own_estimate_only(lora: LoraRoles, role: str, part: str) -> None:
    before = outputs(lora)
    assert torch.equal(before["student"], before["teacher"]) and torch.equal(before["fake"], before["teacher"])
    chosen = [p for name, p in lora.module(role).named_parameters() if part in name]  # type: ignore[arg-type]
    assert chosen
    with torch.no_grad():
        for parameter in chosen:
            parameter.fill_(0.5)
    after = outputs(lora)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {role}


def test_a_role_has_its_adapters_and_its_projection_of_k_and_nothing_else(lora: LoraRoles) -> None:
    names = {role: [name for name, _ in lora.module(role).named_parameters()] for role in ("student", "fake")}  # type: ignore[arg-type]
    assert all("/student/" in name and "/fake/" not in name for name in names["student"])
    assert [name.replace("student", "fake") for name in names["student"]] == names["fake"]
    assert sum("cond_proj" in name for name in names["student"]) == 1
    trained = {p for role in ("student", "fake") for p in lora.module(role).parameters()}  # type: ignore[arg-type]
    assert all(p.requires_grad for p in trained), "optimizers take the parameters that require gradients"
    lora.activate("student")
    assert {p for p in lora.base.parameters() if p.requires_grad} == trained
    assert lora.teacher.precision == lora.student.precision == lora.fake.precision == "fp32"


def test_an_adapter_adds_alpha_over_rank_times_its_product(lora: LoraRoles) -> None:
    """Layer by layer: W x + alpha / rank B A x."""
    lora.activate("fake")
    name, layer = next((n, m) for n, m in lora.base.named_modules() if n.endswith("attn1.to_q"))
    a, b = layer.lora_A["fake"].weight, layer.lora_B["fake"].weight
    assert a.shape[0] == b.shape[1] == 2 and bool((a != 0).any()) and not bool(b.any())
    nn.init.normal_(b)
    x = normal(3, a.shape[1], seed=1)
    plain = plain_denoiser().get_submodule(name)
    torch.testing.assert_close(layer(x), plain(x) + 6.0 / 2 * x @ a.T @ b.T)


def test_one_roles_gradient_reaches_its_weights_while_the_other_is_active(lora: LoraRoles) -> None:
    """The student's graph is kept while the fake score is updated."""
    loss = lora.student(LATENTS, TIMESTEPS, TEXTS, K).sum()
    lora.activate("fake")
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {
        role: [p.grad is not None for p in lora.module(role).parameters()]  # type: ignore[arg-type]
        for role in ("student", "fake")
    }
    assert all(gradients["student"]) and not any(gradients["fake"])


def test_a_base_without_input_for_k_gets_adapters_alone(recwarn: pytest.WarningsRecorder) -> None:
    base = tiny_base(FAMILY)
    roles = LoraRoles(base.denoiser, COORDINATES, rank=2, alpha=2.0, targets=["to_v"])
    assert not recwarn.list, "peft warns about a second adapter, which is meant here"
    assert roles.student.precision == "bf16"
    names = [name for name, _ in roles.module("student").named_parameters()]
    assert names and all("to_v" in name for name in names)
    roles.activate("fake")


def half_lora(base_precision: Precision) -> LoraRoles:
    """Return roles that compute in bf16, with adapters that are not zero."""
    roles = lora_roles("bf16", base_precision)
    torch.manual_seed(0)
    for role in ("student", "fake"):
        for parameter in roles.module(role).parameters():  # type: ignore[arg-type]
            nn.init.normal_(parameter, std=0.3)
    return roles


def test_a_base_in_bf16_gives_every_role_the_bits_of_one_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    expected = outputs(half_lora("fp32"))
    for has_instructions in (True, False):  # without them a float32 base computes in float32
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has_instructions: has)
        found = outputs(half_lora("bf16"))
        assert all(torch.equal(found[role], expected[role]) for role in expected)
    assert not torch.equal(expected["student"], expected["fake"])


def test_a_base_in_bf16_keeps_small_layers_norms_and_adapters_in_float32() -> None:
    roles = half_lora("bf16")
    types = {name: p.dtype for name, p in roles.base.named_parameters()}
    halved = {name for name, dtype in types.items() if dtype == torch.bfloat16}
    kept = ("lora_", "norm", "time_embedding", "cond_proj")
    assert halved == {name for name in types if not any(part in name for part in kept)}
    assert {p.dtype for p in half_lora("fp32").base.parameters()} == {torch.float32}


def test_a_projection_of_k_has_weights_for_each_role() -> None:
    linear = nn.Linear(4, 3, bias=False)
    projection = RoleProjection(linear)
    with torch.no_grad():
        projection.roles["fake"].weight.fill_(1.0)
    x = normal(2, 4, seed=0)
    assert projection.in_features == 4
    assert torch.equal(projection.weight, linear.weight) and torch.equal(projection(x), linear(x))
    projection.active = "fake"
    torch.testing.assert_close(projection(x), x.sum(1, keepdim=True).expand(2, 3))
    assert torch.equal(projection.weight, torch.ones(3, 4))
