"""A bucket on this machine: `python tests/bucket_emulator.py` prints its port, and serves it.

`serving` does so for tests. It is gcp-storage-emulator in memory, with what it lacks and
tensorstore's writers rely on: the generation of what is read, and requests that are to be served
for one generation only. Bucket `bucket` is empty at first; to `forbidden` and `anonymous` all
access is refused, as Google does it.
"""

import contextlib
import functools
import json
import os
import subprocess
import sys
import threading
import urllib.parse
import urllib.request
from http import HTTPStatus

REFUSED = {
    "forbidden": (HTTPStatus.FORBIDDEN, "who@example.com does not have storage.objects.create"),
    "anonymous": (HTTPStatus.UNAUTHORIZED, "Anonymous caller does not have storage.objects.create"),
}


@contextlib.contextmanager
def serving():
    """A process that serves; gives the variables that tell gcsfs and tensorstore of it."""
    with subprocess.Popen(
        [sys.executable, __file__], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        url = f"http://localhost:{process.stdout.readline().strip()}"
        try:
            # Nor is there a server on this machine that gives credentials, to be asked for minutes.
            yield {
                "STORAGE_EMULATOR_HOST": url,
                "TENSORSTORE_GCS_HTTP_URL": url,
                "NO_GCE_CHECK": "true",
            }
        finally:
            process.kill()


def names(variables, prefix):
    """Of the objects of `bucket` that begin so."""
    with urllib.request.urlopen(f"{_objects(variables)}?prefix={_quoted(prefix)}") as answer:
        return [item["name"] for item in json.load(answer).get("items", [])]


def content(variables, name):
    """What an object of `bucket` holds."""
    with urllib.request.urlopen(f"{_objects(variables)}/{_quoted(name)}?alt=media") as answer:
        return answer.read()


def _objects(variables):
    return f"{variables['STORAGE_EMULATOR_HOST']}/storage/v1/b/bucket/o"


def _quoted(name):
    return urllib.parse.quote(name, safe="")


def generation(request, storage) -> int:
    """Of the object that a request is about; 0: there is none."""
    from gcp_storage_emulator.exceptions import NotFound

    name = request.params.get("object_id") or request.query.get("name", [""])[0]
    try:
        return int(storage.get_file_obj(request.params["bucket_name"], name)["generation"])
    except NotFound:
        return 0


def exact(handler):
    @functools.wraps(handler)
    def served(request, response, storage):
        bucket = request.params.get("bucket_name")
        if bucket in REFUSED:
            _ = request.data  # all of a request is to be read before the answer
            response.status, message = REFUSED[bucket]
            response.json({"error": {"code": response.status, "message": message}})
            return
        held = generation(request, storage)
        for name, status in (
            ("ifGenerationMatch", HTTPStatus.PRECONDITION_FAILED),
            ("ifGenerationNotMatch", HTTPStatus.NOT_MODIFIED),
        ):
            wanted = request.query.get(name)
            if wanted and (int(wanted[0]) == held) == (name == "ifGenerationNotMatch"):
                _ = request.data
                response.status = status
                break
        else:
            handler(request, response, storage)
        response["x-goog-generation"] = str(generation(request, storage))

    return served


if __name__ == "__main__":
    from gcp_storage_emulator import server

    server.HANDLERS = tuple(
        (path, {method: exact(f) for method, f in methods.items()} if "bucket" in path else methods)
        for path, methods in server.HANDLERS
    )
    # One request at a time: of more that wait than 5, the others would knock again after seconds.
    server.server.HTTPServer.request_queue_size = 128
    served = server.create_server("localhost", 0, in_memory=True, default_bucket="bucket")
    served.start()
    print(served._api._httpd.server_port, flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads what follows
    threading.Event().wait()
