"""Asks a server with KServe's own clients, over HTTP and gRPC: `kserve_client.py URL GRPC_ADDRESS MODEL`.

Prints one JSON object. It runs in `build/kserve`, because KServe's package wants older packages than the project.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import httpx
import numpy as np
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, InferResponse, RESTConfig
from kserve.protocol.infer_type import RequestedOutput
from kserve.protocol.rest.v2_datamodels import InferenceResponse, ModelMetadataResponse, ServerMetadataResponse

PROMPTS = ("a red heart", "a small cat at the top on a yellow background")


def infer_request(model: str, prompt: str, is_binary: bool) -> InferRequest:
    """Return a request whose input is JSON or binary tensor data, and its outputs alike."""
    tensors = (("prompt", "BYTES", [prompt]), ("seed", "INT64", [7]), ("num_inference_steps", "INT32", [2]))
    inputs = []
    for name, datatype, values in tensors:
        made = InferInput(name, [1], datatype)
        dtype = {"BYTES": np.object_, "INT64": np.int64, "INT32": np.int32}[datatype]
        made.set_data_from_numpy(np.array(values, dtype), binary_data=is_binary)
        inputs.append(made)
    outputs = [RequestedOutput("generated_image", {"binary_data": True})] if is_binary else None
    parameters = {"strict": True, "latency_budget_ms": 60000}
    return InferRequest(model, inputs, "call-1", parameters=parameters, request_outputs=outputs)


def shown(answer: InferResponse) -> dict[str, Any]:
    """Return what a client reads of an answer."""
    picture = next(output for output in answer.outputs if output.name == "generated_image").as_numpy()
    return {
        "id": answer.id,
        "outputs": [output.name for output in answer.outputs],
        "shape": picture.shape,
        "dtype": str(picture.dtype),
        "pixels": picture.tobytes().hex(),
    }


async def ask(url: str, grpc_address: str, model: str) -> dict[str, Any]:
    """Return what the server answers, for each prompt from JSON, from binary tensor data and over gRPC."""
    ServerMetadataResponse.model_validate(httpx.get(f"{url}/v2").json(), extra="forbid")
    ModelMetadataResponse.model_validate(httpx.get(f"{url}/v2/models/{model}").json(), extra="forbid")
    plain, _ = infer_request(model, PROMPTS[0], is_binary=False).to_rest()
    answer = httpx.post(f"{url}/v2/models/{model}/infer", json=plain)
    InferenceResponse.model_validate(answer.json(), extra="forbid")
    rest, grpc = InferenceRESTClient(RESTConfig(protocol="v2", retries=0)), InferenceGRPCClient(grpc_address)
    async with rest, grpc:
        return {
            "live": await rest.is_server_live(url),
            "ready": await rest.is_server_ready(url),
            "model ready": await rest.is_model_ready(url, model),
            "other ready": await rest.is_model_ready(url, "other"),
            "pictures": [
                {
                    "json": shown(await rest.infer(url, infer_request(model, prompt, False), model_name=model)),
                    "binary": shown(await rest.infer(url, infer_request(model, prompt, True), model_name=model)),
                    "grpc": shown(await grpc.infer(infer_request(model, prompt, True))),
                }
                for prompt in PROMPTS
            ],
        }


if __name__ == "__main__":
    print(json.dumps(asyncio.run(ask(*sys.argv[1:]))))
