"""A way to the API server that can be shut: what an operator sees when the server is away."""

import contextlib
import socket
import threading
from pathlib import Path
from urllib.parse import urlsplit

import yaml


class Door:
    """Forwards TCP from a port of this machine; shut, it cuts and refuses every connection."""

    def __init__(self, kubeconfig: Path, folder: Path) -> None:
        told = yaml.safe_load(kubeconfig.read_text())
        (cluster,) = told["clusters"]
        server = urlsplit(cluster["cluster"]["server"])
        self._target = (str(server.hostname), server.port or 443)
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._shut = threading.Event()
        cluster["cluster"]["server"] = f"https://127.0.0.1:{self._listener.getsockname()[1]}"
        # The server's certificate names its own address, not this one.
        cluster["cluster"].pop("certificate-authority", None)
        cluster["cluster"].pop("certificate-authority-data", None)
        cluster["cluster"]["insecure-skip-tls-verify"] = True
        self.kubeconfig = folder / "door.kubeconfig"
        self.kubeconfig.write_text(yaml.safe_dump(told))
        threading.Thread(target=self._accept, daemon=True).start()

    def shut(self) -> None:
        self._shut.set()
        for one in self._open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def open(self) -> None:
        self._shut.clear()

    def close(self) -> None:
        self.shut()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                here, _ = self._listener.accept()
                if self._shut.is_set():
                    here.close()
                    continue
                there = socket.create_connection(self._target)
                self._open += [here, there]
                for one, other in ((here, there), (there, here)):
                    threading.Thread(target=_pass_on, args=(one, other), daemon=True).start()


def _pass_on(one: socket.socket, other: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := one.recv(65536):
            other.sendall(data)
    with contextlib.suppress(OSError):
        other.shutdown(socket.SHUT_RDWR)
