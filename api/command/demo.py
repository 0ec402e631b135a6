"""``chainfed demo``: runs a job from its file to a served model, and explains each step. It uses the public REST API."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from chainfed_ray.activity import Reporter
from chainfed_ray.api.command.following import follow
from chainfed_ray.api.command.local_service import free_port, local_service
from chainfed_ray.api.report.activity_display import ActivityDisplay
from chainfed_ray.api.report.pictures import draw_if_possible
from chainfed_ray.api.report.results import results
from chainfed_ray.api.sdk import calls
from chainfed_ray.api.sdk.clients import Client
from chainfed_ray.cluster.storage import Settings, Storage
from chainfed_ray.records.rounds import JobFinished, JobStarted, Round
from chainfed_ray.spec.job import JobSpec
from chainfed_ray.units import format_bytes

_HOST = "127.0.0.1"
_QUESTIONS = (
    "Compute the shortest path between two nodes of a weighted graph.",
    "Return the symbolic derivative of an expression with respect to a variable.",
    "Reindex the columns of a frame and fill missing values.",
)
_STORY = """ {clients} clients hold sentences from the documentation of Python libraries. \
They may not give a sentence away, and each has between {least} and {most} of memory for training: most of them less than \
the weights of the language model alone. So they train small adapters, {window} layers at a time. Each client trains on its \
own sentences, only the adapters travel, and the server averages them. When a window of layers has had its rounds, it slides \
one layer up. In the end the model is asked: which library is this sentence from?
"""
_ONWARDS = """
  make serve                           the service, at http://127.0.0.1:8000
  .venv/bin/chainfed submit JOB.yaml   a job of your own: see docs/jobs.md
  {job_file:<35}  the job that you have just seen
"""


Records = tuple[JobStarted, list[Round], JobFinished]
Tell = Callable[[Client, JobSpec, str, Records, Path, Console], dict[str, Any]]
"""Explains the job with an id, from the moment when it is over, and returns the result."""


def demo(spec: JobSpec, job_file: Path, out: Path, console: Console) -> dict[str, Any]:
    """Start the service, train the job, draw its plots, call its model, and stop the service.

    The service keeps its data in ``out``. Each step is explained on ``console``. Returns the result, with the model's answers.
    """
    memory = [group.memory for group in spec.fleet.clients]
    story = _STORY.format(
        clients=sum(group.count for group in spec.fleet.clients),
        least=format_bytes(min(memory)),
        most=format_bytes(max(memory)),
        window=spec.chain.window or 2,
    )
    told = explained(story, spec, job_file, out, console, _tell)
    console.print()
    console.print(headed("To go on", _ONWARDS.format(job_file=str(job_file))))
    return told


def explained(story: str, spec: JobSpec, job_file: Path, out: Path, console: Console, tell: Tell) -> dict[str, Any]:
    """Start the service, submit the job, let ``tell`` explain the rest, and stop the service."""
    console.print(headed("Federated fine-tuning in a chain.", story))
    settings = Settings(Storage.at(out))
    console.print(headed("1.", " Starting the service on this machine: Ray, and the REST API on Ray Serve."))
    with ExitStack() as to_the_end:
        with ActivityDisplay(console) as listen:
            service = to_the_end.enter_context(local_service(settings, _HOST, free_port(_HOST), listen))
        client = Client(service.address)
        try:
            console.print(f"   It answers at {service.address}.")
            console.print(headed("2.", f" POST /v1/jobs with {job_file}. The job is checked before it is accepted."))
            with ActivityDisplay(console) as listen:
                Reporter("waiting for the service to check the job", listen).begin()
                job = client.json(calls.submit_job(spec.document()))["id"]
            console.print(headed("3.", f" The chain trains: job {job}."))
            records = follow(client, job, spec, console)
            assert records is not None  # the service is of this version
            console.print(headed("4.", " The result."))
            console.print(results(spec, *records))
            return tell(client, spec, job, records, out, console)
        finally:
            client.close()
            console.print("Stopping the service.")


def headed(head: str, words: str) -> Text:
    """Words that begin in bold. What a user named stands in them as it is: a console here reads no markup."""
    return Text.assemble((head, "bold"), words)


def _tell(client: Client, spec: JobSpec, job: str, records: Records, out: Path, console: Console) -> dict[str, Any]:
    with ActivityDisplay(console) as listen:
        Reporter("drawing the plots", listen).begin()
        plots, drawn = draw_if_possible(out / "plots", *records, spec.chain.cka_threshold)
    for plot in plots:
        console.print(f"   plot: {plot}")
    if not plots:
        console.print(f"   {drawn}")
    record = client.json(calls.get_job(job))
    console.print(headed("5.", f" POST /v1/classify: three sentences for the model {record['model']}."))
    answers = client.json(calls.classify(record["model"], _QUESTIONS))["results"]
    for question, answer in zip(_QUESTIONS, answers, strict=True):
        label = (str(answer["label"]), "bold")
        console.print(Text.assemble(f"   “{question}”\n      → ", label, f" ({answer['score']:.0%})"))
    return {
        **record["result"],
        "id": job,
        "model": record["model"],
        "plots": [str(plot) for plot in plots],
        "answers": [{"text": text, **answer} for text, answer in zip(_QUESTIONS, answers, strict=True)],
    }
