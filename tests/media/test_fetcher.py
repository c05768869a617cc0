"""``Fetcher``: one fetch for all who ask at once, each with an error of its own."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Iterator

import pytest

from opsin.config import MediaConfig
from opsin.errors import MediaError
from opsin.media.fetcher import Fetcher
from tests.server.hosts import PictureHost

BODY = b"anything"


@pytest.fixture
def host() -> Iterator[PictureHost]:
    with PictureHost(BODY).running() as host:
        yield host


@pytest.fixture
def fetcher() -> Iterator[Fetcher]:
    fetcher = Fetcher(MediaConfig(allow_private_media_hosts=True))
    yield fetcher
    fetcher.close()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_same_url_at_once_is_fetched_once(host: PictureHost, fetcher: Fetcher):
    async def ask() -> list[bytes]:
        host.gate.clear()
        tasks = [asyncio.create_task(fetcher.fetch(f"{host.url}/same")) for _ in range(100)]
        await asyncio.sleep(0)  # all have asked
        host.gate.set()
        return await asyncio.gather(*tasks)

    assert asyncio.run(ask()) == [BODY] * 100
    assert host.num_hits == 1
    asyncio.run(fetcher.fetch(f"{host.url}/same"))  # later is another matter: the picture may have changed
    assert host.num_hits == 2


def test_one_who_leaves_does_not_take_the_others_picture_away(host: PictureHost, fetcher: Fetcher):
    async def ask() -> bytes:
        host.gate.clear()
        leaving, staying = (asyncio.create_task(fetcher.fetch(host.url)) for _ in range(2))
        await asyncio.sleep(0)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        host.gate.set()
        return await staying

    assert asyncio.run(ask()) == BODY


def test_error_that_comes_after_who_asked_has_left_is_not_logged(host: PictureHost, fetcher: Fetcher):
    logged: list[object] = []

    async def ask() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: logged.append(context))
        host.gate.clear()
        leaving = asyncio.create_task(fetcher.fetch(f"{host.url}/missing"))
        await asyncio.sleep(0)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        host.gate.set()
        await asyncio.to_thread(wait_until, lambda: fetcher._running == {})
        await asyncio.sleep(0)  # the loop is told
        gc.collect()

    asyncio.run(ask())
    assert logged == []


def test_everybody_gets_an_error_of_his_own(host: PictureHost, fetcher: Fetcher):
    async def ask() -> list[object]:
        asked = (fetcher.fetch(f"{host.url}/missing") for _ in range(2))
        return list(await asyncio.gather(*asked, return_exceptions=True))

    first, second = asyncio.run(ask())
    assert isinstance(first, MediaError)
    assert isinstance(second, MediaError)
    assert first is not second
    assert first.code == second.code == "failed_to_download_image"


def test_slow_host_gets_a_few_connections_and_holds_up_nobody_else(host: PictureHost, fetcher: Fetcher):
    async def ask() -> list[bytes]:
        host.gate.clear()
        slow = [asyncio.create_task(fetcher.fetch(f"{host.url}/{i}")) for i in range(60)]
        with PictureHost(b"quick").running() as other:
            assert await asyncio.gather(*(fetcher.fetch("data:;base64,aGk=") for _ in range(20))) == [b"hi"] * 20
            elsewhere = other.url.replace("127.0.0.1", "localhost")
            assert await fetcher.fetch(elsewhere) == b"quick"
        assert host.num_hits <= 8
        host.gate.set()
        return await asyncio.gather(*slow)

    assert asyncio.run(ask()) == [BODY] * 60
    assert host.num_hits == 60
    wait_until(lambda: fetcher._hosts == {})  # a thread gives its place back behind its last answer


def test_turn_that_does_not_come_in_time_is_the_hosts_fault(host: PictureHost):
    fetcher = Fetcher(MediaConfig(allow_private_media_hosts=True, image_fetch_timeout_s=0.2))

    async def ask() -> list[object]:
        host.gate.clear()
        return await asyncio.gather(*(fetcher.fetch(f"{host.url}/{i}") for i in range(30)), return_exceptions=True)

    errors = asyncio.run(ask())
    assert {error.code for error in errors if isinstance(error, MediaError)} == {"failed_to_download_image"}
    assert len(errors) == 30
    assert host.num_hits <= 16
    assert any("turn did not come" in str(error) for error in errors)
    fetcher.close()


def test_closing_leaves_nobody_waiting_for_a_turn(host: PictureHost):
    fetcher = Fetcher(MediaConfig(allow_private_media_hosts=True))

    async def ask() -> list[object]:
        host.gate.clear()
        asked = [asyncio.create_task(fetcher.fetch(f"{host.url}/{i}")) for i in range(20)]
        await asyncio.sleep(0)
        fetcher.close()
        host.gate.set()
        return await asyncio.gather(*asked, return_exceptions=True)

    ended = asyncio.run(ask())
    assert sum(isinstance(end, asyncio.CancelledError) for end in ended) >= 12
