"""Interceptor around all methods: keys, a bound on open calls, time limits, errors in one shape, log lines, metrics."""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message

from serving.arrival import arrive
from serving.errors import APIError, invalid
from serving.fronts.access import ANYBODY, Caller
from serving.fronts.edge import admit, note_departure, note_error, recorded, request_id_of, too_many
from serving.fronts.services import Services
from serving.rpc.calls import Call, enter
from serving.rpc.statuses import code_of, trailers_of, unreadable

logger = logging.getLogger(__name__)

WATCH = "/grpc.health.v1.Health/Watch"
INFERENCE = "/inference.GRPCInferenceService"
OPEN_METHODS = ("/grpc.health.v1.Health/Check", WATCH, f"{INFERENCE}/ServerLive", f"{INFERENCE}/ServerReady")
"""Methods that need no key: liveness and readiness."""
STATUS_METHODS = (*OPEN_METHODS, f"{INFERENCE}/ModelReady")
"""Methods that are answered even while the server stops or has too many calls."""
MAX_WATCHERS = 64
"""Most calls that may watch the server's health at once. They need no key and stay open."""


class Edge(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc is untyped
    """Admits, reads, answers and counts every call; turns every exception into a gRPC status.

    Methods of every kind are served as streams of bytes, which are the same on the wire. So a call is admitted before
    its message is read, and no exception reaches grpc's own handling, which would send its text to the client.
    """

    def __init__(self, services: Services) -> None:
        self.services = services
        self._num_watchers = 0

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[grpc.RpcMethodHandler | None]], handler_call_details: Any
    ) -> grpc.RpcMethodHandler | None:
        """Return a method with the edge around it; None if there is no such method."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method: str = handler_call_details.method

        async def answer(_: object, context: grpc.aio.ServicerContext) -> None:
            metadata = {name: value for name, value in context.invocation_metadata() or () if isinstance(value, str)}
            request_id = metadata["x-request-id"] = request_id_of(metadata.get("x-request-id", ""))
            is_status = method in STATUS_METHODS
            with recorded(self.services, metadata, request_id, "gRPC", f"gRPC {method}", is_status):
                await self._answer(method, handler, context, metadata)

        return grpc.stream_stream_rpc_method_handler(answer, response_serializer=handler.response_serializer)

    async def _answer(
        self,
        method: str,
        handler: grpc.RpcMethodHandler,
        context: grpc.aio.ServicerContext,
        metadata: Mapping[str, str],
    ) -> None:
        services, started_s, code = self.services, time.monotonic(), grpc.StatusCode.OK
        request_id = metadata["x-request-id"]
        about = (("x-request-id", request_id),)
        context.set_trailing_metadata(about)
        is_watcher = method == WATCH
        self._num_watchers += is_watcher
        services.num_active += not is_watcher
        try:
            enter(Call(self._admit(method, metadata.get("authorization")), context))
            arrive()
            if method not in STATUS_METHODS:
                await services.turnstile.passed()
            await _serve(handler, context, services.config.body_timeout_s)
        except asyncio.CancelledError:
            code = grpc.StatusCode.CANCELLED if context.time_remaining() != 0 else grpc.StatusCode.DEADLINE_EXCEEDED
            if not is_watcher:
                note_departure(services)
            raise
        except grpc.aio.AbortError:  # raised by services that set a gRPC code themselves
            code = context.code()
            raise
        except Exception as error:
            failure = note_error(_known(error, method), services, request_id)
            code = code_of(failure)
            await context.abort(code, failure.message, about + trailers_of(failure))
        finally:
            self._num_watchers -= is_watcher
            services.num_active -= not is_watcher
            services.metrics.observe_answer("gRPC", method, code.name)
            elapsed_ms = 1e3 * (time.monotonic() - started_s)
            fields = {"route": method, "status": code.name, "duration_ms": round(elapsed_ms, 2)}
            logger.info("gRPC %s %s %.1f ms %s", method, code.name, elapsed_ms, request_id, extra=fields)

    def _admit(self, method: str, authorization: str | None) -> Caller:
        """Return the caller of a call that may pass.

        Raises:
            APIError: 401, 429 or 503, see `admit`; 429, too many calls watch the server's health.
        """
        if method == WATCH and self._num_watchers > MAX_WATCHERS:
            raise too_many(f"{MAX_WATCHERS} calls watch the server's health")
        if method in OPEN_METHODS:
            return ANYBODY
        return admit(self.services, authorization, method in STATUS_METHODS)


async def _serve(handler: grpc.RpcMethodHandler, context: grpc.aio.ServicerContext, timeout_s: float) -> None:
    """Read the messages of a call, run its method and write the answer."""
    given: Any
    if handler.request_streaming:
        given = _read_all(handler, context, timeout_s)
    elif (given := await _read(handler, context, timeout_s)) is None:
        raise invalid("the call carries no message; send one", None, "invalid_message")
    behaviour = handler.stream_stream or handler.stream_unary or handler.unary_stream or handler.unary_unary
    answer = behaviour(given, context)
    if inspect.isasyncgen(answer):
        async with aclosing(answer):
            async for part in answer:
                await context.write(part)
    elif (message := await answer) is not None:
        await context.write(message)


async def _read_all(
    handler: grpc.RpcMethodHandler, context: grpc.aio.ServicerContext, timeout_s: float
) -> AsyncIterator[Message]:
    while (message := await _read(handler, context, timeout_s)) is not None:
        yield message


async def _read(handler: grpc.RpcMethodHandler, context: grpc.aio.ServicerContext, timeout_s: float) -> Message | None:
    """Return the client's next message; None after the last.

    Raises:
        APIError: 408, the message did not arrive within `timeout_s`; 400, its bytes cannot be decoded.
    """
    try:
        async with asyncio.timeout(timeout_s):
            raw = await context.read()
    except TimeoutError:
        message = f"no message arrived within {timeout_s:g} s; send it at once"
        raise APIError(408, message, code="body_timeout") from None
    if raw is grpc.aio.EOF:
        return None
    parse = handler.request_deserializer
    try:
        return parse(raw)
    except DecodeError:
        raise unreadable(parse.__self__) from None


def _known(error: Exception, method: str) -> Exception:
    """Convert the error that generated code raises for a method that the server does not implement."""
    if isinstance(error, NotImplementedError):
        return APIError(501, f"{method} is not served", code="not_implemented")
    return error
