"""Request and answer, the same for every peer."""

from __future__ import annotations

import base64
import time
from typing import Annotated, Any

from pydantic import BaseModel, Field

from benchmarks.peers.pipelines import Job
from tdm_runtime.params import MAX_SEED


class ImageRequest(BaseModel):
    """Body of a request. Unknown fields are ignored."""

    prompt: Annotated[str, Field(min_length=1)]
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)]
    num_inference_steps: Annotated[int, Field(ge=1)]

    def job(self) -> Job:
        """Return the job for the pipeline."""
        return Job(self.prompt, self.seed, self.num_inference_steps)


def image_answer(png: bytes, job: Job) -> dict[str, Any]:
    """Return the body of the answer."""
    picture = {
        "b64_json": base64.b64encode(png).decode("ascii"),
        "seed": job.seed,
        "num_inference_steps": job.num_inference_steps,
    }
    return {"created": int(time.time()), "data": [picture]}
