"""Serve S3 out of memory on port 9000, with one bucket made, until SIGTERM."""

import logging
import signal
import threading

import boto3
from moto.server import ThreadedMotoServer

ended = threading.Event()
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda *_: ended.set())
# A line for each request is too much of a log.
logging.getLogger("werkzeug").setLevel(logging.WARNING)
server = ThreadedMotoServer(ip_address="0.0.0.0", port=9000, verbose=False)
server.start()
boto3.client("s3", endpoint_url="http://127.0.0.1:9000").create_bucket(Bucket="perennial")
print("bucket perennial is there", flush=True)
ended.wait()
server.stop()
