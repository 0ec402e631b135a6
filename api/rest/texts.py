"""The texts of one request, which are written at the same time: several prompts, or several texts for one prompt."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from chainfed_ray.serving.messages import Piece, TokenChances

TextStream = AsyncGenerator[tuple[int, Piece], None]
"""Yields a text's index, and a piece of that text."""


@dataclass
class Text:
    """A text in full: what its pieces say together, and its last piece."""

    text: str = ""
    chances: list[TokenChances] = field(default_factory=list)
    last: Piece | None = None

    def add(self, piece: Piece) -> None:
        """Add the next piece."""
        self.text += piece.text
        self.chances += piece.chances
        self.last = piece


async def together(texts: Sequence[AsyncGenerator[Piece, None]]) -> TextStream:
    """The pieces of all texts as they come. The first error ends all of them; so does closing the stream."""
    told = asyncio.Queue[tuple[int, Piece] | Exception | None]()

    async def listen(index: int, text: AsyncGenerator[Piece, None]) -> None:
        try:
            async with aclosing(text):
                async for piece in text:
                    told.put_nowait((index, piece))
            told.put_nowait(None)
        except Exception as error:
            told.put_nowait(error)

    listening = [asyncio.create_task(listen(index, text)) for index, text in enumerate(texts)]
    try:
        writing = len(listening)
        while writing:
            piece = await told.get()
            if isinstance(piece, Exception):
                raise piece
            if piece is None:
                writing -= 1
            else:
                yield piece
    finally:
        for task in listening:
            task.cancel()
        await asyncio.wait(listening)


async def whole(stream: TextStream, count: int) -> list[Text]:
    """Each of ``count`` texts in full."""
    texts = [Text() for _ in range(count)]
    async with aclosing(stream):
        async for index, piece in stream:
            texts[index].add(piece)
    return texts
