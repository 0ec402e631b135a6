"""Plays many sites in one process: ``python -m benchmarks.scale_players ADDRESS FOLDER``, with their keys on standard input.

Each site is a thread that talks to the service as ``chainfed join`` does, by the same code. Its turns are modelled: an update
is the window's tensors with a small change.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from threading import Event, Thread

import torch

from chainfed_ray.client.messages import Training, Update
from chainfed_ray.client.objective import trained_names
from chainfed_ray.client.survey import ClientSurvey, Survey
from chainfed_ray.data.tokens import ExampleCounts
from chainfed_ray.site.connection import Connection, Withdrawn
from chainfed_ray.site.transcript import Transcript
from chainfed_ray.wire.codec import client_of, result_document, survey_document, turn_of, write_tensors
from chainfed_ray.wire.envelope import Done, HashedFile, Order

_WAIT_SECONDS = 20.0
_CLASSES, _ROWS, _TOKENS = 4, 6, 8  # rows of a class, and tokens of each


def main(address: str, folder: Path, keys: Mapping[str, str]) -> None:
    """Play the sites that have the ``keys``, until standard input ends."""
    torch.set_num_threads(1)
    stop = Event()
    threads = [
        Thread(target=_play, args=(address, name, key, f"{place:032x}", folder / name, stop))
        for place, (name, key) in enumerate(keys.items())
    ]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    stop.set()
    for thread in threads:
        thread.join()


def _play(address: str, site: str, key: str, session: str, folder: Path, stop: Event) -> None:
    folder.mkdir(parents=True)
    connection = Connection(address, key, session, Transcript(None), stop, lambda words: print(words, file=sys.stderr))
    try:
        connection.join("1.0", site)
        while not stop.is_set():
            try:
                if order := connection.next(_WAIT_SECONDS, (), ()).order:
                    _carry_out(order, connection, folder)
            except Withdrawn:
                continue
    except Withdrawn:  # it is to stop
        return
    finally:
        connection.close()


def answer_to(order: Order, tensors: Path | None, sent: Path) -> Done:
    """The modelled answer to ``order``, whose tensors are in the file ``tensors``. Its own are written into ``sent``."""
    rows = _CLASSES * _ROWS
    if order.kind == "survey":
        counts = ExampleCounts(rows, _TOKENS, rows * _TOKENS)
        classes = {f"class {place}": _ROWS for place in range(_CLASSES)}
        return Done(content=survey_document(Survey((ClientSurvey(counts, classes),))))
    turn, client = turn_of(order, tensors), client_of(order)
    assert isinstance(turn, Training), "nothing else is modelled"
    names = trained_names(turn.tensors, client.plan.window, turn.global_weight, turn.global_trains)
    changed = {name: turn.tensors[name] + 1e-3 for name in names}
    content, trained = result_document(Update(changed, rows, 1.0, 1, 0.1, 0.1))
    write_tensors(trained, sent)
    return Done(content=content, tensors=HashedFile.of(sent))


def _carry_out(order: Order, connection: Connection, folder: Path) -> None:
    sent = folder / "sent.safetensors"
    connection.fetch_document(order, folder)
    answer = answer_to(order, connection.fetch(order, folder), sent)
    if answer.tensors:
        connection.send(order.id, sent)
    connection.answer(order.id, answer)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.stdin.readline()))
