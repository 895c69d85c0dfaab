"""What a plugin imports: everything that a modality of one's own needs, in one place.

    from mera_ds.plugin import Encoder, Features, register_decoder, register_encoder

`examples/imu/imu.py` is a complete plugin.
"""

from mera_ds.batch import Features, pad_features
from mera_ds.errors import DataError, InputError
from mera_ds.media import register_decoder
from mera_ds.model.connectors import Connector, register_connector
from mera_ds.model.connectors.base import ConnectorOptions
from mera_ds.model.encoders import Encoder, register_encoder
from mera_ds.model.encoders.base import load_weights

__all__ = [
    "Connector",
    "ConnectorOptions",
    "DataError",
    "Encoder",
    "Features",
    "InputError",
    "load_weights",
    "pad_features",
    "register_connector",
    "register_decoder",
    "register_encoder",
]
