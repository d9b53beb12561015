"""A real S3 server for tests: `moto_server` as a process of its own on a free port of the loopback.

    with s3_server() as server:
        server.put("bucket", {"train/one.jpg": data})
        fsspec.filesystem("s3", **server.storage["s3"]).cat("s3://bucket/train/one.jpg")

Also as a place to write to. It keeps all objects in its memory.
"""

import contextlib
import json
import re
import subprocess
import sys
import threading
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import boto3

KEY, SECRET = "AKIAOFTHESETESTS", "secret-of-these-tests"


@dataclass(frozen=True)
class S3Server:
    endpoint: str
    """http://127.0.0.1:<port>"""
    key: str = KEY
    secret: str = SECRET

    @property
    def storage(self) -> dict[str, dict[str, Any]]:
        """Options of fsspec's file systems by protocol, as `crawl.storage` takes them."""
        return {"s3": {"key": self.key, "secret": self.secret, "endpoint_url": self.endpoint}}

    @property
    def public_storage(self) -> dict[str, dict[str, Any]]:
        """The same without credentials."""
        return {"s3": {"anon": True, "endpoint_url": self.endpoint}}

    def client(self, service: str = "s3") -> Any:
        credentials = {"aws_access_key_id": self.key, "aws_secret_access_key": self.secret}
        return boto3.client(service, endpoint_url=self.endpoint, region_name="us-east-1", **credentials)

    def put(self, bucket: str, objects: Mapping[str, bytes], *, public: bool = False) -> None:
        """Put objects into a bucket, which is made where it is not there. `public`: they can be read without credentials."""
        client = self.client()
        client.create_bucket(Bucket=bucket)
        for key, data in objects.items():
            client.put_object(Bucket=bucket, Key=key, Body=data, ACL="public-read" if public else "private")

    @contextlib.contextmanager
    def checking_credentials(self, *actions: str) -> Iterator["S3Server"]:
        """This server, with credentials that it knows, and as one that refuses others. It takes any before and after.

        Args:
            actions: what the credentials are for (ListBucket, PutObject, ...), anywhere on this server; everything if not given.
        """
        users, name = self.client("iam"), f"reader-{uuid.uuid4().hex}"
        users.create_user(UserName=name)
        allowed = [f"s3:{action}" for action in actions or "*"]
        policy = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": allowed, "Resource": "*"}]}
        users.put_user_policy(UserName=name, PolicyName="these", PolicyDocument=json.dumps(policy))
        made = users.create_access_key(UserName=name)["AccessKey"]
        self._check_after(0)
        try:
            yield S3Server(self.endpoint, made["AccessKeyId"], made["SecretAccessKey"])
        finally:
            self._check_after(float("inf"))

    def _check_after(self, requests: float) -> None:
        address = f"{self.endpoint}/moto-api/reset-auth"
        urllib.request.urlopen(urllib.request.Request(address, str(requests).encode(), {"Content-Type": "text/plain"})).close()


@contextlib.contextmanager
def s3_server() -> Iterator[S3Server]:
    """Start a server, wait until it listens, and end it in the end."""
    command = [sys.executable, "-m", "moto.server", "--host", "127.0.0.1", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            said = []
            for line in process.stderr:
                said.append(line)
                if found := re.search(r"Running on (http://127\.0\.0\.1:\d+)", line):
                    break
            else:
                raise RuntimeError("moto_server ended: " + "".join(said))
            # It writes a line for each request, and would stop where nobody reads them.
            threading.Thread(target=process.stderr.read, daemon=True).start()
            yield S3Server(found[1])
        finally:
            process.terminate()
