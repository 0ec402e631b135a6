"""The section for the clients: their classes, and how rows are partitioned among them."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from chainfed_ray.spec.sections import Bytes, Section, Slug


class PartitionSpec(Section):
    """How the examples are partitioned among simulated clients (docs/heterogeneity.md)."""

    scheme: Literal["iid", "dirichlet", "quantity", "column"] = Field(
        "iid",
        description="how rows are assigned: `dirichlet` skews the classes, `quantity` the row counts; `column` keeps a "
        "site's rows together",
    )
    alpha: float = Field(
        1.0,
        gt=0,
        allow_inf_nan=False,
        description="the concentration of `dirichlet` and `quantity`: the smaller, the more skewed",
    )
    column: str | None = Field(
        None, description="for `column`: the column of sites or users; rows with the same value go to one client"
    )


SitePath = Annotated[str, Field(pattern=r"^site:[^\x00]{1,1000}$")]


class ClientClass(Section):
    """A class of clients that have the same resources."""

    name: Slug = Field(description="a name for the class; its clients are called `<name>-0`, `<name>-1`, …")
    count: int = Field(1, ge=1, le=100_000, description="how many clients of this class there are")
    memory: Bytes = Field(
        description="the memory that a client's training may use above the idle process, such as `96MiB`"
    )
    disk: Bytes | None = Field(
        None,
        description="the disk that a client's prefix cache and offloaded activations may use; by default unlimited",
    )
    availability: float = Field(
        1.0, gt=0, le=1, description="the probability that a sampled client answers in its round (simulated)"
    )
    speed: float = Field(
        1.0, ge=1e-8, le=1, description="the speed of a client's machine; at 0.5 a turn takes twice as long (simulated)"
    )
    rank: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="how many of the ranks of each LoRA these clients train; by default all of `chain.adapter.rank`",
    )
    site: Slug | None = Field(
        None, description="the site whose rows these clients have; by default they have a share of `data.train`"
    )
    data: SitePath | None = Field(
        None, description="with `site`: `site:<path>`, a file in the folder that the site offers"
    )


_MOST_CLASSES = 1000


def _few_classes(value: object) -> object:
    """Refuse very many classes before each is looked at."""
    if isinstance(value, list | tuple) and len(value) > _MOST_CLASSES:
        raise ValueError(f"a list of at most {_MOST_CLASSES:,} classes")
    return value


class FleetSpec(Section):
    """The clients that take part, and how the examples are partitioned among them."""

    partition: PartitionSpec = Field(
        default_factory=lambda: PartitionSpec(), description="how examples are partitioned"
    )
    clients: Annotated[
        tuple[ClientClass, ...], Field(strict=False, max_length=_MOST_CLASSES), BeforeValidator(_few_classes)
    ] = Field(description="a list of client classes")

    @property
    def has_ranks(self) -> bool:
        """True if a class of clients has a rank of its own."""
        return any(group.rank is not None for group in self.clients)

    @property
    def at_sites(self) -> tuple[ClientClass, ...]:
        """The classes of clients whose rows are at a site."""
        return tuple(group for group in self.clients if group.site is not None)

    @property
    def size(self) -> int:
        """How many simulated clients there are: those that have a share of the job's rows."""
        return sum(group.count for group in self.clients if group.site is None)

    @property
    def members(self) -> tuple[tuple[str, ClientClass], ...]:
        """The name and class of every simulated client, class by class."""
        simulated = (group for group in self.clients if group.site is None)
        return tuple((f"{group.name}-{index}", group) for group in simulated for index in range(group.count))
