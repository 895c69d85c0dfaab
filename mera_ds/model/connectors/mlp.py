"""Linear layers with GELU between them: LLaVA's `mlp2x_gelu` and its relatives."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from torch import Tensor, nn

from mera_ds.errors import DataError, InputError
from mera_ds.model.connectors.base import Connector, ConnectorOptions, require_positive
from mera_ds.model.official import load_exactly, read_official

PROJECTORS = ("mm_projector", "point_proj")
"""What files call the layers."""


@dataclass(frozen=True, kw_only=True)
class MlpOptions(ConnectorOptions):
    """Options of `mlp`."""

    depth: int = 2
    """Number of linear layers: LLaVA's `mlp2x_gelu` has 2."""
    hidden: int | None = None
    """Width between them; None: that of the language model."""
    widths: tuple[int, ...] = ()
    """The depth - 1 widths between them where they differ: [1024, 2048] for PointLLM's."""

    def __post_init__(self) -> None:
        """Check ranges."""
        super().__post_init__()
        require_positive(depth=self.depth, hidden=1 if self.hidden is None else self.hidden)
        for width in self.widths:
            require_positive(widths=width)
        if self.widths and self.hidden is not None:
            raise InputError("hidden and widths both say how wide the layers are; remove one")
        if self.widths and len(self.widths) != self.depth - 1:
            raise InputError(
                f"widths has {len(self.widths)} entries; depth={self.depth} needs {self.depth - 1}"
            )


class MlpConnector(Connector):
    """Kind `mlp`: linear layers with exact GELU between them, one token per feature token.

    Feature tokens outside the mask become zero vectors. It can start from the projector of a LLaVA
    or a PointLLM; see `load_projector`.
    """

    Options = MlpOptions

    def __init__(
        self, options: MlpOptions, feature_dim: int, llm_dim: int, weights: Path | None
    ) -> None:
        super().__init__(options, feature_dim, llm_dim, weights)
        between = options.widths or [options.hidden or llm_dim] * (options.depth - 1)
        widths = [feature_dim, *between, llm_dim]
        linears = [nn.Linear(inputs, outputs) for inputs, outputs in pairwise(widths)]
        layers: list[nn.Module] = [linears[0]]
        for linear in linears[1:]:
            layers += [nn.GELU(), linear]
        self.layers = nn.Sequential(*layers)
        if weights is not None:
            if options.output_rms is not None:
                raise InputError(
                    f"connector 'mlp': output_rms would rescale the weights of {weights}; remove it"
                )
            load_projector(self.layers, weights)
        self._scale_output(linears[-1], options.output_rms)

    def num_tokens(self, n_features: int) -> int:
        """One token per feature token."""
        return n_features

    def token_mask(self, mask: Tensor) -> Tensor:
        """A token is real if its feature token is."""
        return mask

    def forward(self, values: Tensor, mask: Tensor) -> Tensor:
        """(B, N, D_encoder), (B, N) -> (B, N, D_llm)."""
        tokens: Tensor = self.layers(self.norm(values))
        return tokens * mask[..., None]


def load_projector(layers: nn.Module, weights: Path) -> None:
    """Load linear layers that were published under whatever prefix.

    Known are `…mm_projector.0.weight` (LLaVA: `mm_projector.bin`, `non_lora_trainables.bin`),
    `…point_proj.0.weight` (PointLLM), whatever stands before them, and the bare `0.weight`. Other
    tensors of a file that has such names are ignored.

    Raises:
        InputError: if the file does not exist.
        DataError: if its layers are not exactly these.
    """
    tensors = read_official(weights, "connector 'mlp'").tensors
    load_exactly(layers, projector_tensors(tensors, weights), weights, "mlp")


def projector_tensors(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Return a file's projector under the names `0.weight`, `0.bias`, `2.weight`, …"""
    for name in PROJECTORS:
        pattern = re.compile(rf"(?:.*\.)?{name}\.(.+)")
        matches = {key: match for key in tensors if (match := pattern.fullmatch(key))}
        found = {match[1]: tensors[key] for key, match in matches.items()}
        if len(found) < len(matches):
            raise DataError(f"{path} holds more than one '{name}'; keep the one to start from")
        if found:
            return found
    return dict(tensors)
