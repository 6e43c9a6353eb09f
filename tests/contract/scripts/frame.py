"""A path that is not there, with a good key and with a wrong one, sync and async; prints the version."""

import asyncio

import openai
from expect import raises


def main() -> None:
    with raises(openai.NotFoundError, code="unknown_route"):
        openai.OpenAI().get("/nothing-here", cast_to=object)
    asyncio.run(later())
    print(openai.__version__)


async def later() -> None:
    async with openai.AsyncOpenAI(api_key="sftd-wrong") as client:
        with raises(openai.AuthenticationError, code="invalid_key"):
            await client.get("/nothing-here", cast_to=object)


main()
