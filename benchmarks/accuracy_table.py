"""The tables of the accuracy benchmark: means of the rows over seeds, beside end-to-end training."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev

from rich.table import Table

from benchmarks.accuracy_protocols import PROTOCOLS
from benchmarks.accuracy_rows import Row
from benchmarks.methods import AUTOMATIC

Place = tuple[str, float | None]
References = dict[tuple[str, float | None, int], Row]


def results(rows: Sequence[Row], methods: Sequence[str], references: References) -> Table:
    """A line for each data set, alpha, protocol and method. Accuracy is in per cent of the test rows.

    Compute and bytes are multiples of those of the end-to-end run at equal steps, in ``references``.
    """
    table = _table("accuracy", "− end-to-end", "seeds", "steps", "compute", "bytes", "seconds")
    for (dataset, alpha), protocol, method, group in _groups(rows, methods):
        there = [row for row in group if row.accuracy is not None]
        pairs = [(row, references[row.dataset, row.alpha, row.seed]) for row in there if _has(references, row)]
        accuracies = [100 * row.accuracy for row in there if row.accuracy is not None]
        gains = [
            100 * (row.accuracy - other.accuracy)
            for row, other in pairs
            if row.accuracy is not None and other.accuracy is not None
        ]
        table.add_row(
            dataset,
            _alpha(alpha),
            protocol,
            method,
            _spread(accuracies) or "not reached",
            "" if protocol == "target" else _spread(gains, "+"),
            f"{len(there)}/{len(group)}" if protocol == "target" else str(len(there)),
            _mean((row.client_steps for row in there), ".0f"),
            _mean((_ratio(row.client_cpu_seconds, other.client_cpu_seconds) for row, other in pairs), ".2f", "×"),
            _mean((_ratio(row.bytes_sent, other.bytes_sent) for row, other in pairs), ".2f", "×"),
            _mean((row.seconds for row in there), ".0f"),
        )
    return table


def tuning(rows: Sequence[Row], methods: Sequence[str]) -> Table:
    """A line for each data set, alpha, method and pair of learning rates: accuracy on the validation rows, in per cent."""
    table = _table("adapters", "head", "validation", "seeds")
    for (dataset, alpha), protocol, method, group in _groups(rows, methods):
        by_rates = defaultdict[tuple[float, float], list[Row]](list)
        for row in group:
            rounds = row.options["job"]["rounds"]
            by_rates[rounds["learning_rate"], rounds["head_learning_rate"]].append(row)
        for (adapters, head), alike in by_rates.items():
            found = [100 * row.validation_accuracy for row in alike if row.validation_accuracy is not None]
            table.add_row(
                dataset, _alpha(alpha), protocol, method, f"{adapters:g}", f"{head:g}", _spread(found), str(len(found))
            )
    return table


def regrets(rows: Sequence[Row]) -> list[str]:
    """Sentences that say by how many points each automatic start is below the best fixed start, at equal compute."""
    means = defaultdict[Place, dict[str, float]](dict)
    starts = defaultdict[tuple[Place, str], set[int]](set)
    for (dataset, alpha), protocol, method, group in _groups(rows, sorted({row.method for row in rows})):
        found = [100 * row.accuracy for row in group if row.accuracy is not None]
        if protocol == "compute" and found:
            means[dataset, alpha][method] = fmean(found)
            starts[(dataset, alpha), method] = {row.start_layer for row in group if row.start_layer is not None}
    said = []
    for place, accuracies in means.items():
        for automatic, beginning in AUTOMATIC.items():
            fixed = {name: mean for name, mean in accuracies.items() if name.startswith(beginning)}
            if automatic in accuracies and fixed:
                best = max(fixed, key=fixed.__getitem__)
                layers = " and ".join(str(layer) for layer in sorted(starts[place, automatic]))
                said.append(
                    f"{place[0]} {_alpha(place[1])}, equal compute: {automatic} starts at layer {layers}: "
                    f"{accuracies[automatic]:.1f}; {best}, the best of {len(fixed)} fixed starts: {fixed[best]:.1f}; "
                    f"regret {fixed[best] - accuracies[automatic]:.1f} points"
                )
    return said


def _table(*numbers: str) -> Table:
    table = Table("data", "α", "protocol", "method", box=None, header_style="bold", pad_edge=False)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _groups(rows: Iterable[Row], methods: Sequence[str]) -> list[tuple[Place, str, str, list[Row]]]:
    """The groups of rows that differ by their seed only, in the order of protocols and of ``methods``."""
    found = defaultdict[tuple[Place, str, str], list[Row]](list)
    for row in rows:
        found[(row.dataset, row.alpha), row.protocol, row.method].append(row)
    places = list(dict.fromkeys(place for place, _, _ in found))
    return [
        (place, protocol, method, found[place, protocol, method])
        for place in places
        for protocol in PROTOCOLS
        for method in methods
        if (place, protocol, method) in found
    ]


def _has(references: References, row: Row) -> bool:
    return (row.dataset, row.alpha, row.seed) in references


def _alpha(alpha: float | None) -> str:
    return "IID" if alpha is None else f"{alpha:g}"


def _spread(values: Sequence[float], sign: str = "") -> str:
    """The mean ± standard deviation of a sample, or the mean alone if the sample is one value."""
    if not values:
        return ""
    mean = f"{fmean(values):{sign}.1f}"
    return f"{mean} ± {stdev(values):.1f}" if len(values) > 1 else mean


def _mean(values: Iterable[float | None], form: str, unit: str = "") -> str:
    there = [value for value in values if value is not None]
    return f"{fmean(there):{form}}{unit}" if there else ""


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None
