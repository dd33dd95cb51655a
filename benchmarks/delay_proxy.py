"""A TCP proxy that delays every byte, each way, and limits no throughput: the distance of a server on this machine.

python -m benchmarks.delay_proxy LISTEN_PORT HOST PORT ONE_WAY_MS
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys

PIECE, PIECES_UNDER_WAY = 1 << 18, 4096


async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay: float) -> None:
    """Hand on what comes in, `delay` seconds later, until its end."""
    loop = asyncio.get_running_loop()
    under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(PIECES_UNDER_WAY)

    async def hand_on() -> None:
        while True:
            due, piece = await under_way.get()
            await asyncio.sleep(max(0.0, due - loop.time()))
            if not piece:
                writer.close()
                return
            writer.write(piece)
            await writer.drain()

    task = asyncio.create_task(hand_on())
    with contextlib.suppress(OSError):
        while piece := await reader.read(PIECE):
            await under_way.put((loop.time() + delay, piece))
    await under_way.put((0.0, b""))
    with contextlib.suppress(OSError):
        await task


async def main(port: int, host: str, to: int, delay: float) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection(host, to)
        for each in writer, there_writer:
            each.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await asyncio.gather(carry(reader, there_writer, delay), carry(there_reader, writer, delay))

    server = await asyncio.start_server(serve, "127.0.0.1", port)
    print("serving", flush=True)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), float(sys.argv[4]) / 1e3))
