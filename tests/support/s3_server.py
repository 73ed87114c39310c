"""An S3 server on this machine (moto) that injects faults."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from typing import Any

import pyarrow.fs as pafs
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "nobody",
    "AWS_SECRET_ACCESS_KEY": "nothing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}

Fault = Callable[[dict[str, Any]], bool]
"""Return whether to answer this request with an error. It may block, to delay the answer."""


class S3Server:
    """In-memory objects behind the S3 interface, on a free loopback port.

    Attributes:
        requests: (method, path, query) of every request.
        fault: Decides which requests fail with HTTP 500; None if no request fails.

    """

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self.requests: list[tuple[str, str, str]] = []
        self.fault: Fault | None = None

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._server.server_port}"

    def make_bucket(self, name: str) -> None:
        pafs.S3FileSystem(endpoint_override=self.address, scheme="http", allow_bucket_creation=True).create_dir(name)

    def root(self, bucket: str, folder: str = "root") -> str:
        """Return a storage root in a bucket; credentials come from the environment."""
        return f"s3://{bucket}/{folder}?scheme=http&endpoint_override={self.address}"

    def _answer(self, request: dict[str, Any], start: Any) -> Iterable[bytes]:
        self.requests.append((request["REQUEST_METHOD"], request["PATH_INFO"], request.get("QUERY_STRING", "")))
        if self.fault is not None and self.fault(request):
            request["wsgi.input"].read(int(request.get("CONTENT_LENGTH") or 0))
            start("500 Internal Server Error", [("Content-Type", "text/plain"), ("Content-Length", "0")])
            return [b""]
        return self._app(request, start)
