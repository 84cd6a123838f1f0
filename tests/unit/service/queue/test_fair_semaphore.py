"""Fair semaphore."""

from __future__ import annotations

import asyncio

from mtlsign.service.queue.fair_semaphore import FairSemaphore


def test_fair_semaphore_with_two_names_alternates() -> None:
    async def play() -> list[str]:
        semaphore, order = FairSemaphore(1), []

        async def hold(name: str) -> None:
            async with semaphore.acquire(name):
                order.append(name)
                await asyncio.sleep(0)

        async with semaphore.acquire("holder"):
            greedy = [asyncio.create_task(hold("greedy")) for _ in range(6)]
            await asyncio.sleep(0)
            modest = [asyncio.create_task(hold("modest")) for _ in range(2)]
            await asyncio.sleep(0)
            greedy[5].cancel()
        await asyncio.gather(*greedy, *modest, return_exceptions=True)
        async with asyncio.timeout(1), semaphore.acquire("later"):
            order.append("later")
        return order

    order = asyncio.run(play())
    assert order == ["greedy", "modest", "greedy", "modest", "greedy", "greedy", "greedy", "later"]
