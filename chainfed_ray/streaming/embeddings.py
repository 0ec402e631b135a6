"""Embedding tables that stay in the checkpoint: only the rows in use are read."""

import torch
from torch import Tensor, nn

from chainfed_ray.streaming.checkpoint import Checkpoint


class RowTable(nn.Embedding):
    """An embedding table [V, D] that reads only the rows in use. While not ``enabled`` it gives zeros, without memory.

    An existing table is turned into one by changing its class to a subclass of its own. So families whose tables add an offset
    or a scale to the lookup keep doing so.
    """

    _checkpoint: Checkpoint
    _source: str
    enabled: bool

    @classmethod
    def take_over(cls, table: nn.Embedding, checkpoint: Checkpoint, source: str) -> None:
        """Make ``table`` read its rows from the checkpoint's tensor called ``source``."""
        own = type(table)
        table.__class__ = type(own.__name__, (cls,) if own is nn.Embedding else (own, cls), {})
        for name, value in (("_checkpoint", checkpoint), ("_source", source), ("enabled", True)):
            object.__setattr__(table, name, value)
        # Some families look at the device of a table before they use it. One that reads the table itself gets no numbers.
        blank = torch.full((), torch.nan, dtype=table.weight.dtype).expand(table.weight.shape)
        table.weight = nn.Parameter(blank, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        """Ids of any shape → rows [..., D]."""
        dtype = self.weight.dtype
        if not self.enabled:
            return torch.zeros((), dtype=dtype).expand(*input.shape, self.embedding_dim)
        unique, places = input.unique(return_inverse=True)
        return self._checkpoint.rows(self._source, unique, dtype)[places]


def embedding_tables(model: nn.Module) -> list[tuple[str, nn.Embedding]]:
    """Every embedding table of which a model looks up rows, with its name.

    DeBERTa's table of relative positions is none: each layer is given the whole of it.
    """
    tables = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
    return [(name, table) for name, table in tables if not name.endswith("rel_embeddings")]
