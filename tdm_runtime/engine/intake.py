"""Turns requests into samples: place in the order of arrival, deadline, kinds of calls."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

from tdm_runtime.engine.delivery import Delivery
from tdm_runtime.engine.sample import Sample
from tdm_runtime.model.decoder import preview_shape
from tdm_runtime.model.loaded_model import LoadedModel
from tdm_runtime.params import SamplingParams
from tdm_runtime.scheduling.cost_model import CostModel, Kind
from tdm_runtime.scheduling.work import Lane


def call_kind(model: LoadedModel, stage: str, shape: tuple[int, ...] = ()) -> Kind:
    """Return the kind of a model's call. LoRAs of one base share their kinds.

    Args:
        stage: See `Kind.stage`.
        shape: Shape of one sample's latents; empty for stages that do not depend on it.
    """
    if model.base is None:
        return Kind(stage, shape, model.name)
    is_shared = stage.startswith("decode") or stage == "encode_image"
    return Kind(stage, shape, model.base if is_shared else f"{model.base} with LoRAs")


def joined(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the shape of one row with as many latents as several shapes have; a single shape stays as it is.

    Latents and references of a step cost about as much as latents alone of this size.
    """
    return shapes[0] if len(shapes) == 1 else (shapes[0][0], 1, sum(math.prod(shape[1:]) for shape in shapes))


class Intake:
    """Makes samples, in order of arrival."""

    def __init__(self, costs: CostModel, patience: float, auto_stretch: float) -> None:
        """
        Args:
            costs: Costs that deadlines are computed from.
            patience, auto_stretch: See `EngineConfig`.
        """
        self._costs = costs
        self._patience = patience
        self._auto_stretch = auto_stretch
        self._order = itertools.count()

    def sample(self, model: LoadedModel, params: SamplingParams, delivery: Delivery, now_s: float) -> Sample:
        """Return the sample of a request.

        Raises:
            InvalidRequestError: The model does not serve these parameters.
        """
        model.check(params)
        shape, order = model.latent_shape(params), next(self._order)
        open_counts = delivery.open_step_counts(params, model.recipe.step_counts)
        edit, references = params.edit, model.reference_shapes(params)
        unknown = [] if model.encoder is None else [*map(model.encoder.expect, params.given_pictures)]
        encoded = [*itertools.compress(references or [shape], unknown)]
        open_steps = sorted({count if edit is None else edit.num_steps(count) for count in open_counts})
        key = model.prompt_key(params)
        is_alone = delivery.strict and not model.is_batch_invariant
        if key.max_chunks > 1:  # a prompt of another length cannot share a call
            is_alone |= len(model.text_encoder.encoder.tokenize(key).chunks) > 1
        alone = order if is_alone else None
        decodes = model.decoders[params.decoder].calls(shape)
        cut = order if decodes.number > 1 else alone
        sample = Sample(
            denoise=Lane(call_kind(model, "denoise", joined([shape, *references])), alone, references),
            decode=Lane(call_kind(model, f"decode:{params.decoder}", decodes.shape), cut),
            decodes_left=decodes.number,
            steps_left=params.num_steps,
            urgency=(now_s, order),
            open_steps=tuple(open_steps),
            open_counts=open_counts,
            needs_text=model.text_encoder.expect(key),
            text=call_kind(model, "text"),
            needs_image=bool(encoded),
            image=call_kind(model, "encode_image", joined(encoded or [shape])),
            preview=call_kind(model, f"decode:{model.preview_decoder}", preview_shape(shape)),
            previews_left=delivery.num_previews,
            model=model,
            params=params,
            delivery=delivery,
            is_background=delivery.is_background,
            submitted_s=now_s,
            ready_s=now_s,
        )
        self._set_deadlines(sample)
        if open_steps:
            sample.steps_left = open_steps[0]
        return sample

    def _set_deadlines(self, sample: Sample) -> None:
        budget_ms = sample.delivery.latency_budget_ms
        if budget_ms is not None:
            sample.elapsed_s = 1e-3 * sample.delivery.elapsed_ms
            sample.hand_over_s = 1e-3 * sample.delivery.hand_over_ms
            sample.encoding_s = 1e-3 * sample.delivery.encoding_ms
        budget_s = None if budget_ms is None else 1e-3 * budget_ms
        sample.set_deadlines(self._costs, sample.submitted_s, budget_s, self._patience, self._auto_stretch)

    def drafts(self, sample: Sample) -> list[Sample]:
        """Return the draft that a request asks for, if any. It has the deadline of its picture and goes before it."""
        if not sample.delivery.draft or sample.params.num_inference_steps == 1:
            return []
        params = replace(sample.params, num_inference_steps=1)
        delivery = replace(sample.delivery, min_inference_steps=None, num_previews=0)
        draft = self.sample(sample.model, params, delivery, sample.submitted_s)
        draft.draft_of, sample.held = sample, []
        sample.unseen_steps = 1  # the draft shows the first step better than a preview
        deadline_s, (_, earlier), (_, later) = sample.urgency[0], sample.urgency, draft.urgency
        draft.urgency, sample.urgency = (deadline_s, earlier), (deadline_s, later)
        return [draft]
