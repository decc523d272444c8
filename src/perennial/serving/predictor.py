"""Score rows with the model of a bundle, behind KServe's V2 protocol."""

import asyncio
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from perennial import bundle
from perennial.bundle import Bundle
from perennial.contract import Contract
from perennial.drift import light
from perennial.serving import options
from perennial.serving.service import Question, probabilities
from perennial.serving.wire import Answer, Ask

# Fewer rows take less time than handing them to a thread.
_MANY_ROWS = 2000


class Predictor:
    """A bundle as a service."""

    def __init__(self, name: str, loaded: Bundle, contract: Contract, revision: str) -> None:
        self.name = name
        self._bundle = loaded
        self._contract = contract
        self._told = {"model_digest": loaded.short, "revision": revision}

    def metadata(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Inputs and outputs, from the contract."""
        return self._contract.metadata()

    def read(self, ask: Ask) -> Question:
        """Check a request against the contract."""
        return Question(ask, self._contract.decode(ask.tensors))

    async def answer(self, question: Question, headers: Mapping[str, str]) -> Answer:
        """Score the rows; large requests on a thread, so that probes are answered meanwhile."""
        rows = self._contract.for_model(question.matrix)
        if len(rows) > _MANY_ROWS:
            scores = await asyncio.to_thread(self._bundle.score, rows)
        else:
            scores = self._bundle.score(rows)
        return Answer(question.ask.id, self.name, probabilities(self.name, scores), self._told)

    def stop(self) -> None:
        """Nothing is left to finish."""


def main(argv: Sequence[str] | None = None) -> int:
    """Serve one bundle until SIGTERM."""
    return options.guarded(lambda: _serve(sys.argv[1:] if argv is None else argv))


def _serve(argv: Sequence[str]) -> int:
    given, _ = options.shared().parse_known_args(argv)
    with options.bundle_folder(given.bundle) as folder, light.without("sklearn"):
        digest = bundle.verify(folder, given.digest or None)
        with bundle.preflight(folder):
            # KServe takes as long to import as the child takes to try the model.
            from perennial.serving import host

            args = host.parse("predictor", options.shared(), argv)
        loaded = bundle.load(folder, digest)
    contract = Contract.from_plain(loaded.contract)
    return host.serve(Predictor(args.model_name, loaded, contract, args.revision), args)


if __name__ == "__main__":
    sys.exit(main())
