"""Target for a tdm.images.v1.ImageService server. Message types come from the server's reflection."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from benchmarks.targets import TIMEOUT_S, Outcome, picture_fault, split_stages
from benchmarks.workload import Request
from tdm_runtime.media.image_file import encode_image

SERVICE = "tdm.images.v1.ImageService"
OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.enable_http_proxy", 0))
STAGES = ("queue_ms", "text_ms", "image_ms", "steps_ms", "decode_ms", "encode_ms", "total_ms")


class GRPCTarget:
    """Target that makes unary calls over one connection. Create it with `grpc_target`."""

    def __init__(self, channel: grpc.aio.Channel, service: ServiceDescriptor, model: str | None = None) -> None:
        self._model = model
        self._request = GetMessageClass(service.methods_by_name["Generate"].input_type)
        self._generate = _method(channel, service, "Generate")
        self._list_models = _method(channel, service, "ListModels")
        self._list_request = GetMessageClass(service.methods_by_name["ListModels"].input_type)

    async def served_models(self) -> list[dict[str, Any]]:
        """Return the models that the server lists."""
        answer = await self._list_models(self._list_request(), timeout=TIMEOUT_S)
        return [{"id": card.id, "backend": card.backend, "digest": card.digest} for card in answer.models]

    async def send(self, request: Request) -> Outcome:
        """Implement `Target.send`. There is no gRPC deadline, because the server would use it as a latency budget."""
        message = self._request(**self._fields(request))
        sent_s = time.perf_counter()
        try:
            async with asyncio.timeout(TIMEOUT_S):
                answer = await self._generate(message)
        except TimeoutError:
            return Outcome(time.perf_counter(), "timeout")
        except grpc.aio.AioRpcError as error:
            is_refused = error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            retry_after_s = 1e-3 * float(_trailer(error, "retry-after-ms") or 0)
            return Outcome(time.perf_counter(), _error_code(error), is_refused, retry_after_s=retry_after_s)
        answered_s = time.perf_counter()
        (image,) = answer.images
        timings = {name: getattr(answer.timings, name) for name in STAGES}
        stages = split_stages(timings, 1e3 * (answered_s - sent_s), "grpc")
        return Outcome(answered_s, picture_fault(image.content, request.size), False, image.num_inference_steps, stages)

    def _fields(self, request: Request) -> dict[str, Any]:
        steps = request.num_inference_steps
        is_auto = steps == "auto"
        fields: dict[str, Any] = {
            "prompt": request.prompt,
            "model": self._model,
            "size": None if request.size is None else dict(zip(("width", "height"), request.size, strict=True)),
            "seed": request.seed,
            "num_inference_steps": None if is_auto else steps,
            "auto_steps": {"min_inference_steps": request.min_inference_steps} if is_auto else None,
            "latency_budget_ms": request.latency_budget_ms,
            "strength": request.strength,
        }
        if request.strength is not None:
            fields["image"] = [encode_image(request.given_pixels(), "png")]
        return {name: value for name, value in fields.items() if value is not None}


@asynccontextmanager
async def grpc_target(base_url: str, model: str | None = None) -> AsyncIterator[GRPCTarget]:
    """Connect to HOST:PORT or grpc://HOST:PORT.

    Raises:
        ConnectionError: no server answers there, or it does not have this service.
    """
    address = urlsplit(base_url).netloc or base_url
    service = await asyncio.to_thread(_describe, address)
    async with grpc.aio.insecure_channel(address, OPTIONS) as channel:
        yield GRPCTarget(channel, service, model)


def _describe(address: str) -> ServiceDescriptor:
    with grpc.insecure_channel(address, OPTIONS) as channel:
        try:
            return DescriptorPool(ProtoReflectionDescriptorDatabase(channel)).FindServiceByName(SERVICE)
        except (grpc.RpcError, KeyError) as error:
            reason = error.details() if isinstance(error, grpc.RpcError) else "it is another server"
            remedy = "start tdm-serve with --grpc-port and pass --base-url HOST:PORT"
            raise ConnectionError(f"{address} does not serve {SERVICE} ({reason}); {remedy}") from None


def _method(channel: grpc.aio.Channel, service: ServiceDescriptor, name: str) -> Any:
    method = service.methods_by_name[name]
    return channel.unary_unary(
        f"/{service.full_name}/{name}",
        request_serializer=GetMessageClass(method.input_type).SerializeToString,
        response_deserializer=GetMessageClass(method.output_type).FromString,
    )


def _error_code(error: grpc.aio.AioRpcError) -> str:
    """Return for example "RESOURCE_EXHAUSTED queue_full", or only the status if there is no code."""
    code = _trailer(error, "code")
    return str(error.code().name) if code is None else f"{error.code().name} {code}"


def _trailer(error: grpc.aio.AioRpcError, name: str) -> str | None:
    value = dict(error.trailing_metadata() or ()).get(name)
    return value if isinstance(value, str) else None
