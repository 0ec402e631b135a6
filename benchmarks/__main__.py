"""The command line of the benchmarks: ``python -m benchmarks NAME``."""

import argparse

from chainfed_ray.device.lean_imports import load_models

load_models()  # before a benchmark loads all of the libraries: most of them leave the work to processes of their own

from benchmarks import (  # noqa: E402
    accuracy,
    autoscale,
    evaluation,
    film_reviews,
    first_round,
    fleet_memory,
    hostile,
    idle,
    language,
    load,
    memory,
    padding,
    plan,
    quantized,
    scale,
    service,
    serving,
    serving_memory,
    sites,
    zoo,
)

parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measures the published figures.")
names = parser.add_subparsers(metavar="NAME", required=True)
memory.add_options(names.add_parser("memory", help="the memory of a client's step against that of the whole model"))
accuracy.add_options(
    names.add_parser(
        "accuracy", help="the accuracy that a fleet reaches by each method, at equal steps, compute or bytes"
    )
)
language.add_options(names.add_parser("language", help="the answers of a language model, by each way of training it"))
first_round.add_options(names.add_parser("first-round", help="the seconds from a job's command to its first round"))
idle.add_options(names.add_parser("idle", help="the memory of a client's process before any client uses it"))
evaluation.add_options(names.add_parser("evaluation", help="the server's memory while it evaluates the whole model"))
plan.add_options(names.add_parser("plan", help="the CPU seconds of a dry run, and of the check of a job"))
quantized.add_options(
    names.add_parser("quantized", help="the bytes read from disk in a turn, with quantized weights and without")
)
padding.add_options(
    names.add_parser("padding", help="training steps whose examples of like length run together, against padded ones")
)
scale.add_options(names.add_parser("scale", help="what the coordinator of a large fleet takes"))
fleet_memory.add_options(
    names.add_parser("fleet-memory", help="the memory of all processes of a job with a large fleet, round by round")
)
autoscale.add_options(names.add_parser("autoscale", help="how fast an autoscaling cluster grows and shrinks"))
sites.add_options(names.add_parser("sites", help="a job over sites against one whose rows the server deals"))
serving.add_options(names.add_parser("serving", help="the time to classify for many stacks in one batch"))
serving_memory.add_options(
    names.add_parser(
        "serving-memory", help="the memory of a process that answers, after 10,000 requests over 100 stacks"
    )
)
hostile.add_options(names.add_parser("hostile", help="hostile requests to a service, and how long others wait"))
load.add_options(names.add_parser("load", help="a service under load: throughput, waiting times, a killed process"))
service.add_options(
    names.add_parser("service", help="a service of many jobs: its lists, metrics, checks, watchers and load")
)
film_reviews.add_options(names.add_parser("film-reviews", help="make a data set of film reviews for accuracy --data"))
zoo.add_options(names.add_parser("zoo", help="which model families run, and how the others are refused"))
chosen = parser.parse_args()
chosen.run(chosen)
