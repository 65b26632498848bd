"""ONNX files of every family give what torch gives, also at shapes other than the traced one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from export.errors import ExportError
from export.onnx_export import EXAMPLE_SIZES, export_onnx
from export.tensorrt_build import build_plan, size_ranges
from export.traceable import traceable
from tdm_runtime.backends.interface import Interface, TensorSpec
from tdm_runtime.errors import CheckpointError
from tdm_runtime.families import FAMILIES, DecoderModule, Denoiser, decoder_for, denoiser_for
from tdm_runtime.families.unet import MANY_UPSAMPLERS
from tdm_runtime.model.components import TextEncoderModule
from tests.tiny_models import (
    TEXT_TOKENS,
    TINY_MODELS,
    tiny_cogvideox,
    tiny_flux,
    tiny_motion_unet,
    tiny_pixart,
    tiny_sana,
    tiny_sd3,
    tiny_sdxl_unet,
    tiny_wan,
)
from tests.tiny_pipelines import dc_vae, flux2_vae

TOLERANCE = 1e-4
"""Largest distance to torch, as a share of the largest number: float32 summed in another order, through all layers."""
VARIANTS: Mapping[str, Callable[[], Any]] = {
    **{name: TINY_MODELS[name] for name in FAMILIES},
    "sdxl": lambda: tiny_sdxl_unet(
        block_out_channels=(16,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",)
    ),
    "sd3": lambda: tiny_sd3(num_layers=1),
    "sana": lambda: tiny_sana(num_layers=1),
    "flux-dev": lambda: tiny_flux(guidance_embeds=True),
    "pixart": lambda: tiny_pixart(num_layers=1),
    "pixart-1024": lambda: tiny_pixart(num_layers=1, use_additional_conditions=True),
    "wan": lambda: tiny_wan(num_layers=1),
    "animatediff": lambda: tiny_motion_unet(
        block_out_channels=(16,),
        down_block_types=("CrossAttnDownBlockMotion",),
        up_block_types=("CrossAttnUpBlockMotion",),
    ),
    "animatediff-levels": tiny_motion_unet,
    "cogvideox": lambda: tiny_cogvideox(num_layers=1),
    "cogvideox-5b": lambda: tiny_cogvideox(num_layers=1, use_rotary_positional_embeddings=True),
}
"""Every family, and more variants of those whose published models need different replacements. Most have one layer,
because an export takes seconds for each."""
OTHER_SIZES: tuple[Mapping[str, int], ...] = (
    {"batch": 3, "height": 10, "width": 14, "frames": 5, "tokens": 9},
    {"batch": 1, "height": 20, "width": 6, "frames": 1, "tokens": 3},
    {"batch": 2, "height": 8, "width": 8, "frames": 3, "tokens": TEXT_TOKENS},  # as the tiny models were trained
)
ODD_SIZES = ({"batch": 1, "height": 9, "width": 11, "frames": 2, "tokens": 4},)
"""For models without patches. The others take multiples of their patch size only."""


def denoiser_of(variant: str) -> tuple[Denoiser, Interface]:
    """A denoiser whose output depends on K, with the same weights on every call."""
    denoiser = denoiser_for(VARIANTS[variant]())
    denoiser.add_step_condition(8)
    weight = denoiser.timestep_embedding.cond_proj.weight
    nn.init.normal_(weight, generator=torch.Generator().manual_seed(2))
    return denoiser, denoiser.interface(TEXT_TOKENS if "cogvideox" in variant else "tokens")


def named(interface: Interface, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {spec.name: tensor for spec, tensor in zip(interface.inputs, inputs, strict=True)}


def ask_torch(module: nn.Module, interface: Interface, inputs: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad():
        output: Tensor = module(**named(interface, inputs))
    return output


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@dataclass(frozen=True)
class Exported:
    """A module and its file."""

    module: nn.Module
    interface: Interface
    file: Path

    def __post_init__(self) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(self.file), options, providers=["CPUExecutionProvider"])
        object.__setattr__(self, "session", session)

    session: Any = None

    def ask_onnxruntime(self, inputs: tuple[Tensor, ...]) -> Tensor:
        feed = {name: tensor.numpy() for name, tensor in named(self.interface, inputs).items()}
        return torch.from_numpy(self.session.run(None, feed)[0])

    def weight_types(self) -> set[int]:
        """ONNX types of matrices and kernels."""
        model = onnx.load(self.file, load_external_data=False)
        return {weight.data_type for weight in model.graph.initializer if len(weight.dims) > 1 and weight.external_data}


def export(module: nn.Module, interface: Interface, file: Path, dtype: torch.dtype = torch.float32) -> Exported:
    export_onnx(module, interface, file, title=file.stem, dtype=dtype)
    return Exported(module, interface, file)


SLOW = {"cogvideox", "cogvideox-5b", "animatediff", "animatediff-levels", "flux-dev", "pixart-1024", "sdxl"}
"""Variants of clips, which take long to export, and of families that are exported anyway, as SDXL is in `TestDtypes`;
`TestTraceable` has all."""


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in VARIANTS],
)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Each denoiser, exported once."""
    return export(*denoiser_of(request.param), tmp_path_factory.mktemp(request.param) / f"{request.param}.onnx")


class TestDenoisers:
    def test_equals_torch_at_the_traced_shape_and_others(self, exported: Exported) -> None:
        draw = torch.Generator().manual_seed(3)
        takes_odd_sizes = exported.module.patch_size == 1
        for sizes in (EXAMPLE_SIZES, *OTHER_SIZES, *(ODD_SIZES if takes_odd_sizes else ())):
            inputs = exported.interface.random_inputs(sizes, draw)
            expected = ask_torch(exported.module, exported.interface, inputs)
            assert_close(exported.ask_onnxruntime(inputs), expected)

    def test_equals_torch_in_openvino(self, exported: Exported) -> None:
        program = openvino.Core().compile_model(
            str(exported.file), "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
        )
        inputs = exported.interface.random_inputs(OTHER_SIZES[0], torch.Generator().manual_seed(3))
        feed = {name: tensor.numpy() for name, tensor in named(exported.interface, inputs).items()}
        actual = torch.from_numpy(program(feed)[0])
        assert_close(actual, ask_torch(exported.module, exported.interface, inputs))

    def test_tensorrt_builds_a_plan_of_it(self, exported: Exported, tmp_path: Path) -> None:
        sizes = size_ranges(exported.interface, [(8, 8), (16, 24)], 4, frames=(1, 3, 5))
        build_plan(exported.file, tmp_path / "plan", exported.interface, sizes, gpu="sm_89")
        assert (tmp_path / "plan").stat().st_size > 10_000

    def test_every_sample_has_its_own_timestep_and_step_count(self, exported: Exported) -> None:
        inputs = exported.interface.random_inputs(OTHER_SIZES[0], torch.Generator().manual_seed(4))
        latents, _, _, *prompt = inputs
        timesteps, step_counts = torch.tensor([999.0, 500.0, 19.5]), torch.tensor([1, 2, 4])
        together = exported.ask_onnxruntime((latents, timesteps, step_counts, *prompt))
        every = (latents, timesteps, step_counts, *prompt)
        alone = [exported.ask_onnxruntime(tuple(tensor[i : i + 1] for tensor in every)) for i in range(3)]
        assert_close(together, torch.cat(alone))
        other_step_counts = exported.ask_onnxruntime((latents, timesteps, step_counts.flip(0), *prompt))
        assert (other_step_counts - together)[[0, 2]].abs().amax() > 100 * TOLERANCE

    def test_file_says_what_it_holds(self, exported: Exported) -> None:
        model = onnx.load(exported.file, load_external_data=False)
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        assert metadata["tdm.component"] == exported.file.stem
        assert metadata["tdm.dtype"] == "float32"
        shapes = {
            value.name: tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)
            for value in model.graph.input
        }
        assert shapes == {spec.name: spec.shape for spec in exported.interface.inputs}
        assert exported.weight_types() == {onnx.TensorProto.FLOAT}


class TestTraceable:
    """Replacements for export give the same results as the methods that they replace."""

    MORE = (*OTHER_SIZES, {"batch": 1, "height": 6, "width": 26, "frames": 2, "tokens": 3})

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_changes_no_result(self, variant: str) -> None:
        denoiser, interface = denoiser_of(variant)
        self.assert_unchanged(denoiser, interface, self.MORE)

    def test_changes_no_result_of_cogvideox_1_5(self) -> None:
        model = tiny_cogvideox(num_layers=1, use_rotary_positional_embeddings=True, patch_size_t=2)
        denoiser = denoiser_for(model)
        sizes = tuple({"batch": 2, "frames": frames, "height": 8, "width": 6} for frames in (2, 4))
        self.assert_unchanged(denoiser, denoiser.interface(TEXT_TOKENS), sizes)

    def test_changes_no_result_of_z_image_around_multiples_of_32_tokens(self) -> None:
        denoiser, interface = denoiser_of("z_image")
        sides = ((8, 16), (6, 22), (10, 14))  # 32, 33 and 35 tokens of the picture
        sizes = tuple(
            {"batch": 3, "height": height, "width": width, "tokens": tokens}
            for height, width in sides
            for tokens in (32, 33, 70)
        )
        self.assert_unchanged(denoiser, interface, sizes)

    @staticmethod
    def assert_unchanged(denoiser: Denoiser, interface: Interface, many: tuple[Mapping[str, int], ...]) -> None:
        for sizes in many:
            inputs = interface.random_inputs(sizes, torch.Generator().manual_seed(5))
            expected = ask_torch(denoiser, interface, inputs)
            with traceable(denoiser):
                actual = ask_torch(denoiser, interface, inputs)
            assert_close(actual, expected)

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_upsampling_follows_every_size(self, variant: str) -> None:
        """A traced UNet doubles its sizes, and is wrong where a level had an odd one, unless it passes sizes on."""
        denoiser, _ = denoiser_of(variant)
        with traceable(denoiser):
            counts = [part.num_upsamplers for part in denoiser.modules() if hasattr(part, "num_upsamplers")]
        assert bool(counts) == (variant in ("stable_diffusion", "sdxl", "animatediff", "animatediff-levels"))
        assert all(count == MANY_UPSAMPLERS for count in counts)

    @pytest.mark.parametrize("variant", VARIANTS)
    def test_changes_what_the_family_states_and_restores_it_afterwards(self, variant: str) -> None:
        denoiser, _ = denoiser_of(variant)
        parts = list(denoiser.modules())
        before = [dict(part.__dict__) for part in parts]
        stated = [any(family.replacement(part) for family in FAMILIES.values()) for part in parts]
        with pytest.raises(RuntimeError, match="stop"), traceable(denoiser):
            assert [part.__dict__ != was for part, was in zip(parts, before, strict=True)] == stated
            raise RuntimeError("stop")
        assert all(part.__dict__ == was for part, was in zip(parts, before, strict=True))


def _kl_decoder() -> DecoderModule:
    return DecoderModule(
        AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            scaling_factor=0.5,
            shift_factor=0.1,
        )
    )


def _tiny_decoder() -> DecoderModule:
    channels, blocks = (8, 8), (1, 1)
    return DecoderModule(
        AutoencoderTiny(
            encoder_block_out_channels=channels,
            decoder_block_out_channels=channels,
            num_encoder_blocks=blocks,
            num_decoder_blocks=blocks,
        )
    )


def _flux2_decoder() -> DecoderModule:
    return decoder_for(flux2_vae())


def _dc_decoder() -> DecoderModule:
    return decoder_for(dc_vae())


class TestDecoders:
    @pytest.mark.parametrize("decoder", [_kl_decoder, _tiny_decoder, _flux2_decoder, _dc_decoder])
    def test_pixels_equal_torch(self, decoder: Callable[[], DecoderModule], tmp_path: Path) -> None:
        torch.manual_seed(0)
        module = decoder()
        self.assert_pixels(export(module, module.interface(), tmp_path / "decoder.onnx"))

    @staticmethod
    def assert_pixels(decoder: Exported) -> None:
        """Levels may differ by one where torch and the runtime round a half apart."""
        for sizes in (EXAMPLE_SIZES, *OTHER_SIZES):
            inputs = decoder.interface.random_inputs(sizes, torch.Generator().manual_seed(7))
            expected = ask_torch(decoder.module, decoder.interface, inputs).int()
            actual = decoder.ask_onnxruntime(inputs)
            assert actual.dtype == torch.uint8
            assert actual.shape == expected.shape
            assert expected.float().std() > 10
            off = (actual.int() - expected).abs()
            assert off.max() <= 1
            assert off.float().mean() < 1e-3


def test_text_encoder_equals_torch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=12,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    module = TextEncoderModule(CLIPTextModel(config))
    encoder = export(module, module.interface(), tmp_path / "text_encoder.onnx")
    for batch in (2, 3, 1):
        inputs = encoder.interface.random_inputs({"batch": batch}, torch.Generator().manual_seed(8))
        assert_close(encoder.ask_onnxruntime(inputs), ask_torch(module, encoder.interface, inputs))


def test_a_row_is_repeated_along_its_own_axis(tmp_path: Path) -> None:
    """AnimateDiff repeats a prompt for each frame of its clip."""

    class Repeats(nn.Module):
        def forward(self, latents: Tensor, frames: Tensor) -> Tensor:
            batch, count = frames.shape
            rows = latents.repeat_interleave(count, dim=0, output_size=batch * count)
            return rows.reshape(batch, count, 4)[:, -1] + frames.sum(1, keepdim=True)

    interface = Interface(
        (TensorSpec("latents", "float32", ("batch", 4)), TensorSpec("frames", "float32", ("batch", "frames"))),
        TensorSpec("model_output", "float32", ("batch", 4)),
    )
    exported = export(Repeats(), interface, tmp_path / "repeats.onnx")
    for frames in (3, 5, 1):
        inputs = interface.random_inputs({"batch": 2, "frames": frames}, torch.Generator().manual_seed(6))
        assert_close(exported.ask_onnxruntime(inputs), ask_torch(exported.module, interface, inputs))


class TestDtypes:
    def test_float16_weights_between_float32_tensors(self, tmp_path: Path) -> None:
        denoiser, interface = denoiser_of("sdxl")
        before = {name: weight.clone() for name, weight in denoiser.state_dict().items()}
        half = export(denoiser, interface, tmp_path / "denoiser.onnx", torch.float16)
        assert half.weight_types() == {onnx.TensorProto.FLOAT16}
        sizes = size_ranges(interface, [(8, 8), (16, 24)], 4)
        assert build_plan(half.file, tmp_path / "plan", interface, sizes, gpu="sm_86").precision == "fp16"
        assert {value.type for value in half.session.get_outputs()} == {"tensor(float)"}
        types = {value.name: value.type for value in half.session.get_inputs()}
        assert types["latents"] == types["timesteps"] == types["prompt_embeds"] == "tensor(float)"
        inputs = interface.random_inputs(OTHER_SIZES[0], torch.Generator().manual_seed(9))
        assert_close(half.ask_onnxruntime(inputs), ask_torch(denoiser, interface, inputs), tolerance=1e-2)
        after = denoiser.state_dict()
        assert all(torch.equal(after[name], weight) for name, weight in before.items())

    def test_bfloat16_weights(self, tmp_path: Path) -> None:
        module = _tiny_decoder()
        export_onnx(module, module.interface(), tmp_path / "decoder.onnx", title="decoder", dtype=torch.bfloat16)
        model = onnx.load(tmp_path / "decoder.onnx", load_external_data=False)
        kernels = {weight.data_type for weight in model.graph.initializer if len(weight.dims) == 4}
        assert kernels == {onnx.TensorProto.BFLOAT16}
        sizes = size_ranges(module.interface(), [(8, 8), (16, 24)], 4)
        plan = build_plan(tmp_path / "decoder.onnx", tmp_path / "plan", module.interface(), sizes, gpu="sm_86")
        assert plan.precision == "bf16"
        assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT

    def test_other_dtypes_are_refused(self, tmp_path: Path) -> None:
        module = _tiny_decoder()
        with pytest.raises(ExportError, match=r"decoder: dtype is torch.float64; use one of torch.float32"):
            export_onnx(module, module.interface(), tmp_path / "d.onnx", title="decoder", dtype=torch.float64)


class TestInterfaces:
    @pytest.mark.parametrize(
        ("variant", "names"),
        [
            ("stable_diffusion", ()),
            ("sdxl", ("pooled_prompt_embeds", "time_ids")),
            ("pixart", ("attention_mask",)),
            ("sd3", ("pooled_prompt_embeds",)),
            ("flux", ("pooled_prompt_embeds",)),
            ("flux-dev", ("pooled_prompt_embeds", "guidance")),
            ("flux2", ()),
            ("cogvideox", ()),
            ("z_image", ("attention_mask",)),
            ("sana", ("attention_mask", "guidance")),
        ],
    )
    def test_inputs_are_those_that_the_family_reads(self, variant: str, names: tuple[str, ...]) -> None:
        _, interface = denoiser_of(variant)
        assert tuple(spec.name for spec in interface.inputs[4:]) == names
        assert interface.output.shape == interface.inputs[0].shape

    def test_cogvideox_with_sines_reads_a_fixed_number_of_tokens(self) -> None:
        denoiser, _ = denoiser_of("cogvideox")
        with pytest.raises(CheckpointError, match=rf"tokens is 'tokens'; .* exactly {TEXT_TOKENS}"):
            denoiser.interface("tokens")


class TestErrors:
    INTERFACE = Interface(
        (TensorSpec("latents", "float32", ("batch", 4, "height", "width")),),
        TensorSpec("model_output", "float32", ("batch", 4, "height", "width")),
    )

    def test_a_size_that_becomes_a_constant_is_named(self, tmp_path: Path) -> None:
        class Bakes(nn.Module):
            def forward(self, latents: Tensor) -> Tensor:
                return latents + float(int(latents.shape[-2] // 2))

        with pytest.raises(ExportError, match=r"baker cannot be exported .* holds only where \(?height//2\)? is 8"):
            export_onnx(Bakes(), self.INTERFACE, tmp_path / "m.onnx", title="baker")

    def test_an_unknown_operator_is_named(self, tmp_path: Path) -> None:
        class Sorts(nn.Module):
            def forward(self, latents: Tensor) -> Tensor:
                return latents + torch.special.airy_ai(latents)

        with pytest.raises(ExportError, match=r"airy cannot be exported .*airy_ai"):
            export_onnx(Sorts(), self.INTERFACE, tmp_path / "m.onnx", title="airy")


def test_large_weights_lie_beside_the_file(exported: Exported) -> None:
    beside = exported.file.with_name(exported.file.name + ".data")
    weights, tables = (
        sum(tensor.numel() * 4 for tensor in tensors)
        for tensors in (exported.module.parameters(), exported.module.buffers())
    )
    assert 0.8 * weights <= beside.stat().st_size <= 1.2 * (weights + tables)
    assert np.fromfile(beside, dtype=np.float32).size > 0
