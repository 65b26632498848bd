"""The request and the answer, the same for every peer."""

from __future__ import annotations

import base64
import time
from typing import Annotated, Any

from pydantic import BaseModel, Field

from benchmarks.peers.pipelines import Job
from tdm_runtime.params import MAX_SEED


class ImageRequest(BaseModel):
    """The body. Fields that are not named here are ignored."""

    prompt: Annotated[str, Field(min_length=1)]
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)]
    num_inference_steps: Annotated[int, Field(ge=1)]

    def job(self) -> Job:
        """What the pipeline is asked for."""
        return Job(self.prompt, self.seed, self.num_inference_steps)


def image_answer(png: bytes, job: Job) -> dict[str, Any]:
    """The body of the answer."""
    picture = {
        "b64_json": base64.b64encode(png).decode("ascii"),
        "seed": job.seed,
        "num_inference_steps": job.num_inference_steps,
    }
    return {"created": int(time.time()), "data": [picture]}
