"""Many who watch one job: ``python -m benchmarks.service_watchers ADDRESS JOB COUNT``. It says when all of them do."""

import asyncio
import sys

import httpx


async def main(address: str, job: str, count: int) -> None:
    """Watch until a line comes on standard input, and then print how many lines of data were told in all."""
    told, open_now = 0, asyncio.Semaphore(0)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)

    async def watch(http: httpx.AsyncClient) -> None:
        nonlocal told
        headers = {"Accept": "text/event-stream"}
        async with http.stream("GET", f"/v1/jobs/{job}/events", headers=headers) as response:
            response.raise_for_status()
            open_now.release()
            async for line in response.aiter_lines():
                told += line.startswith("data: ")

    async with httpx.AsyncClient(base_url=address, timeout=None, limits=limits, trust_env=False) as http:
        watching = []
        for _ in range(count):
            watching.append(asyncio.create_task(watch(http)))
            await open_now.acquire()
        print("watching", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        for one in watching:
            one.cancel()
        await asyncio.gather(*watching, return_exceptions=True)
    print(told, flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
