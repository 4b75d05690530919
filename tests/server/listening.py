"""An application behind a real socket, on the server's own protocol, and what it says to the bytes that are sent."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import uvicorn
from starlette.types import ASGIApp

from ultrafuser.server.access.connections import guarded_protocol


@asynccontextmanager
async def listening(app: ASGIApp, limit_seconds: float) -> AsyncIterator[int]:
    """The port where the application is served; clients have so long to send and to read."""
    protocol = guarded_protocol(limit_seconds, limit_seconds)
    server = uvicorn.Server(uvicorn.Config(app, http=protocol, ws="none", lifespan="off", log_config=None))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        task = asyncio.create_task(server._serve([listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        yield int(listener.getsockname()[1])
        server.should_exit = server.force_exit = True
        await task


async def say(port: int, *parts: bytes, pause_seconds: float = 0.01) -> bytes:
    """Everything that the server says to these parts, sent one after the other, until it closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        async with asyncio.timeout(20):
            for part in parts:
                writer.write(part)
                await asyncio.sleep(pause_seconds)
            return await reader.read()
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
