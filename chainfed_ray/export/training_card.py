"""How a stack was trained, as sections of its model card: data, base model, budget, recipe and seed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from chainfed_ray.hub import resolve
from chainfed_ray.model.saved_stack import SavedStack
from chainfed_ray.records.rounds import JobStarted, Round
from chainfed_ray.spec.job import JobSpec
from chainfed_ray.units import format_bytes

_MOST_CLASSES = 50  # of clients


def licence_of(base: str) -> str | None:
    """The licence of a base model, as the README.md of its folder says it. None if it does not."""
    try:
        _, front, _ = (resolve(base) / "README.md").read_text(encoding="utf-8").split("---\n", 2)
        found = yaml.safe_load(front).get("license")
    except Exception:  # a folder may hold anything; a card without a licence is one
        return None
    return found if isinstance(found, str) else None


def training_card(
    spec: JobSpec, job_started: JobStarted, rounds: Sequence[Round], saved: SavedStack, licence: str | None
) -> str:
    """The sections. They have no row, and no path of the service's machine."""
    trained = {
        "job": spec.name,
        "round of this stack": "none" if saved.round is None else f"{saved.round + 1} of {len(rounds)}",
        **_validation(rounds, saved),
        "seed": spec.seed,
    }
    return "\n\n".join(
        [
            f"## How it was trained\n\n{_table(trained)}",
            f"### Data\n\n{_table(_data(spec, job_started))}",
            f"### Base model\n\n{_table(_base(spec, job_started, licence))}",
            f"### Memory\n\n{_budgets(job_started, rounds)}",
            f"### Recipe\n\n{_table(_recipe(spec, job_started))}",
        ]
    )


def _validation(rounds: Sequence[Round], saved: SavedStack) -> dict[str, Any]:
    """The scores of the whole model with this stack on the validation rows, if it was evaluated after its round."""
    evaluation = rounds[saved.round].evaluation if saved.round is not None else None
    if evaluation is None:
        return {}
    scores = {"loss": evaluation.loss, "accuracy": evaluation.accuracy, "macro-F1": evaluation.macro_f1}
    return {f"{name} on the validation rows": f"{score:.4g}" for name, score in scores.items() if score is not None}


def _data(spec: JobSpec, job_started: JobStarted) -> dict[str, Any]:
    splits = {name: getattr(spec.data, name) for name in ("train", "validation", "test")}
    taken = "a tenth of the training rows"
    partition = spec.fleet.partition
    at_sites = {group.site: group for group in spec.fleet.at_sites}
    sources = {name: shown_source(source) if source else taken for name, source in splits.items()}
    if splits["train"] is None:
        sources = {
            name: "rows of the sites" if source is None else shown_source(source) for name, source in splits.items()
        }
    return {
        **sources,
        **({"sites": len(at_sites)} if at_sites else {}),
        "columns": ", ".join(_columns(spec)),
        "tokens of an example, at most": spec.data.max_length,
        "partition": partition.scheme if partition.scheme != "dirichlet" else f"dirichlet, α = {partition.alpha:g}",
        "sha256 of the partition": job_started.partition_hash,
    }


def _columns(spec: JobSpec) -> list[str]:
    texts = [name for _, name in spec.data.columns]
    return [*texts, spec.data.label] if spec.model.task == "sequence-classification" else texts


def shown_source(source: str) -> str:
    """A source of rows or a base model for strangers: of a path on a machine its last part alone."""
    scheme, _, name = source.partition(":")
    return f"{scheme}:{Path(name).name}" if scheme == "path" else source


def _base(spec: JobSpec, job_started: JobStarted, licence: str | None) -> dict[str, Any]:
    return {
        "base": shown_source(spec.model.base),
        "licence": licence or "not stated in its folder",
        "task": spec.model.task,
        "layers": job_started.layers,
        "dtype of the frozen weights": spec.model.dtype,
        "their quantization": spec.model.quantization,
    }


def _budgets(job_started: JobStarted, rounds: Sequence[Round]) -> str:
    """Each class of clients: what it declared, and the most that a turn was planned to take and took."""
    rows = ["| class of clients | declared | planned, at most | measured, at most |", "|---|---|---|---|"]
    turns = [turn for record in rounds for turn in record.turns]
    job_started = job_started.with_late(site for record in rounds for site in record.late)
    classes = dict.fromkeys(group.client_class for group in job_started.admitted)
    for name in list(classes)[:_MOST_CLASSES]:
        plans = [group for group in job_started.admitted if group.client_class == name]
        own = [turn for turn in turns if turn.client_class == name]
        planned = max([*(plan.planned_bytes for plan in plans), *(turn.planned_bytes for turn in own)])
        peaks = [turn.peak_bytes for turn in own if turn.peak_bytes is not None]
        peak = format_bytes(max(peaks)) if peaks else "–"
        rows.append(f"| {name} | {format_bytes(plans[0].budget_bytes)} | {format_bytes(planned)} | {peak} |")
    if len(classes) > _MOST_CLASSES:
        rows.append(f"| … {len(classes)} in all | | | |")
    left_out = f"\n\n{job_started.left_out} clients could not take part." if job_started.left_out else ""
    return "\n".join(rows) + left_out


def _recipe(spec: JobSpec, job_started: JobStarted) -> dict[str, Any]:
    chain, rounds, aggregation = spec.chain, spec.rounds, spec.aggregation
    private = spec.privacy
    noise = f"C = {private.clip:g}, z = {private.noise_multiplier:g}, δ = {private.delta:g}" if private else "none"
    return {
        "chain": f"layers {job_started.start_layer} to {job_started.layers - 1}, {job_started.window} at a time",
        "schedule": f"{chain.schedule}, {chain.direction}, look-ahead {chain.look_ahead}, head {chain.head}",
        "adapter": f"{chain.adapter.kind}, {chain.adapter.width} wide",
        "rounds": f"{rounds.total} at most, {rounds.clients} clients in each",
        "local training": f"{rounds.local_steps} steps" if rounds.local_steps else f"{rounds.local_epochs} epochs",
        "batch size": rounds.batch_size,
        "learning rates": f"adapters {rounds.learning_rate:g}, head {rounds.head_learning_rate:g}, {rounds.decay} decay",
        "aggregation": aggregation.rule
        if aggregation.optimizer == "none"
        else f"{aggregation.rule}, {aggregation.optimizer}",
        "differential privacy": noise,
        **({"rules of the caller's own": ", ".join(job_started.own_rules)} if job_started.own_rules else {}),
    }


def _table(values: dict[str, Any]) -> str:
    cells = ((name, str(value).replace("|", "\\|").replace("\n", " ")) for name, value in values.items())
    return "| | |\n|---|---|\n" + "\n".join(f"| {name} | {value} |" for name, value in cells)
