"""What the tests of evaluation share."""

import threading
from collections.abc import Iterator

import pytest

from .chat_server import ChatServer


@pytest.fixture
def server() -> Iterator[ChatServer]:
    server = ChatServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
