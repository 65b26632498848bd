"""The step count is embedded as stock pipelines embed guidance_scale - 1."""

from __future__ import annotations

import pytest
import torch
from diffusers import LatentConsistencyModelPipeline

from tdm_runtime.families.step_condition import embed_step_count


@pytest.mark.parametrize("dim", [64, 256])
@pytest.mark.parametrize("steps", range(1, 9))
def test_a_stock_pipeline_at_guidance_scale_k_plus_1_embeds_k(steps: int, dim: int) -> None:
    guidance_scale = steps + 1.0
    w = torch.tensor(guidance_scale - 1).repeat(2)
    theirs = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, embedding_dim=dim)
    ours = embed_step_count(torch.tensor([steps, steps]), dim)
    assert ours.shape == (2, dim) and ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dim", [64, 256])
def test_embeddings_of_different_step_counts_are_far_apart(dim: int) -> None:
    embeddings = embed_step_count(torch.arange(1, 9), dim)
    distances = torch.cdist(embeddings, embeddings) + 1e9 * torch.eye(8)
    assert distances.min() > 1.0


def test_a_batch_gives_the_same_embeddings_as_single_samples() -> None:
    steps = torch.tensor([4, 1, 8])
    alone = torch.cat([embed_step_count(k[None], 64) for k in steps])
    assert torch.equal(embed_step_count(steps, 64), alone)
