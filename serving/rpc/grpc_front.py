"""The replica's gRPC server: grpc.aio on its own port, in the replica's event loop, with the same services as HTTP."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from serving.fronts.services import Services
from serving.rpc.grpc_edge import Edge
from serving.rpc.image_service import ImageServicer
from serving.rpc.inference_service import InferenceServicer
from serving.rpc.protos import images_pb2, images_pb2_grpc, open_inference_pb2, open_inference_pb2_grpc
from serving.rpc.video_service import VideoServicer

SERVICES = (
    *(service.full_name for service in images_pb2.DESCRIPTOR.services_by_name.values()),
    open_inference_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name,
)
HEALTH_S = 0.2
"""Seconds between two looks at whether the server is ready."""
GRACE_S = 0.5
"""Seconds in which sent answers reach the kernel; then calls that watch the server's health are closed."""
KIB = 1024
LIMITS = {
    "grpc.max_metadata_size": 16 * KIB,
    "grpc.max_concurrent_streams": 256,  # on one connection
    "grpc.server_handshake_timeout_ms": 10_000,
    "grpc.max_connection_idle_ms": 300_000,
    "grpc.keepalive_time_ms": 60_000,  # finds clients that vanished
    "grpc.keepalive_timeout_ms": 20_000,
    "grpc.http2.min_ping_interval_without_data_ms": 10_000,  # limits the client's pings
    "grpc.http2.max_ping_strikes": 2,
    "grpc.compression_enabled_algorithms_bitset": 1,  # only identity: a message is as large as it was on the wire
    "grpc.so_reuseport": 1,  # replicas share the port, as with HTTP
}


class GRPCFront:
    """A listening gRPC server, created by `start`."""

    def __init__(self, server: grpc.aio.Server, health_servicer: health.aio.HealthServicer, services: Services) -> None:
        self._server = server
        self._health = health_servicer
        self._serving = asyncio.create_task(server.wait_for_termination())
        self._following = asyncio.create_task(self._follow(services))

    @classmethod
    async def start(cls, services: Services, host: str, port: int) -> GRPCFront:
        """Start to listen and answer.

        Raises:
            OSError: the server cannot listen on the address.
        """
        limits = LIMITS | {"grpc.max_receive_message_length": services.config.max_picture_body_bytes}
        server = grpc.aio.server(interceptors=(Edge(services),), options=tuple(limits.items()))
        images_pb2_grpc.add_ImageServiceServicer_to_server(ImageServicer(services), server)
        images_pb2_grpc.add_VideoServiceServicer_to_server(VideoServicer(services), server)
        open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(InferenceServicer(services), server)
        health_servicer = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
        reflection.enable_server_reflection((*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            server.add_insecure_port(address)
        except RuntimeError as error:
            raise OSError(f"gRPC cannot listen on {address}; choose another with --grpc-port") from error
        await server.start()
        return cls(server, health_servicer, services)

    @property
    def is_running(self) -> bool:
        """Whether the server listens."""
        return not self._serving.done()

    async def close(self) -> None:
        """Stop listening. Return when the kernel has every open answer."""
        self._following.cancel()
        with suppress(asyncio.CancelledError):
            await self._following
        await self._health.enter_graceful_shutdown()
        await self._server.stop(GRACE_S)
        await self._serving

    async def _follow(self, services: Services) -> None:
        """Report to watching clients when pictures can be made, and when they no longer can."""
        reported = None
        while True:
            if (is_ready := services.is_ready) is not reported:
                reported = is_ready
                statuses = health_pb2.HealthCheckResponse
                status = statuses.SERVING if is_ready else statuses.NOT_SERVING
                for name in ("", *SERVICES):
                    await self._health.set(name, status)
            await asyncio.sleep(HEALTH_S)
