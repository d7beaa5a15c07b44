"""What networks of token sequences share: the check of the task, and tokens as vectors."""

from __future__ import annotations

from torch import Tensor, nn

from fedkd.errors import ConfigError
from fedkd.types import Task


class Embedding(nn.Module):
    """Looks tokens up: numbers ``(batch, places) -> (batch, places, width)``.

    Vectors start with standard deviation 0.02 and are multiplied by the square root of their width
    (Vaswani et al., NeurIPS 2017, section 3.4), without which a network that normalises nothing
    hardly sees them.
    """

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.scale = width**0.5
        self.table = nn.Embedding(vocabulary, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the vector of each token; whole numbers of any type are tokens."""
        # Opacus' ghost clipping of embeddings reads tokens as if they lay without gaps.
        vectors: Tensor = self.table(x.long().contiguous())
        return vectors * self.scale


def sequences(task: Task, model: str) -> tuple[int, int]:
    """Return how many tokens an input of ``task`` has, and how many different ones there are.

    Raises:
        ConfigError: the inputs are no sequences of tokens.
    """
    if not task.sequence or len(task.input_shape) != 1:
        raise ConfigError(
            f"model {model!r} needs sequences of tokens, but an input of task {task.name!r} has "
            f"the shape {task.input_shape} and no tokens; use model 'mlp', or 'cnn' for images"
        )
    return task.input_shape[0], task.classes
