"""``python -m benchmarks NAME``."""

import argparse

from benchmarks import accuracy, evaluation, film_reviews, first_round, idle, memory, plan

parser = argparse.ArgumentParser(prog="python -m benchmarks", description="What is published, measured.")
names = parser.add_subparsers(metavar="NAME", required=True)
memory.add_options(names.add_parser("memory", help="the memory of a client's step against that of the whole model"))
accuracy.add_options(
    names.add_parser("accuracy", help="what a fleet learns by each method, at equal steps, compute or bytes")
)
first_round.add_options(names.add_parser("first-round", help="the seconds from a job's command to its first round"))
idle.add_options(names.add_parser("idle", help="what a client's process holds before any client uses it"))
evaluation.add_options(names.add_parser("evaluation", help="the server's memory while it judges the whole model"))
plan.add_options(names.add_parser("plan", help="the CPU that a dry run takes, and the check of a job"))
film_reviews.add_options(names.add_parser("film-reviews", help="data for accuracy --data, from a package of others"))
chosen = parser.parse_args()
chosen.run(chosen)
